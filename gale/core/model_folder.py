"""Model folders: their names, and their JSON files, which come from anywhere and may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gale.core.errors import ModelError


def model_name(folder: Path) -> str:
    """The name of a model. A trained one stands in RUN/model; the run's name says more than "model"."""
    path = folder.resolve()
    return path.parent.name if path.name == "model" else path.name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that may be absent (then empty). Raises :class:`ModelError`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # includes broken UTF-8
        raise ModelError(
            f"{path} cannot be read, it is not valid JSON: {error}", hint="Copy or download the folder again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content
