"""Finding a model by name: the built-in one, one under ``GALE_HOME/models``, or any folder."""

from __future__ import annotations

from pathlib import Path

from gale.core import files
from gale.core.errors import ModelError
from gale.core.settings import settings

BUILTIN = Path(__file__).parent / "builtin" / "gale-0"


def resolve_model(name_or_path: str | None) -> Path:
    """The folder of a model; None means the built-in one. Raises :class:`ModelError` where there is none.

    A folder of that path wins over a model of that name, as a shell user would expect.
    """
    if name_or_path is None:
        return BUILTIN
    path = files.expand(name_or_path)
    if path.is_dir():
        return path
    named = settings().home / "models"
    if name_or_path == BUILTIN.name:
        return BUILTIN
    if Path(name_or_path).name == name_or_path and (named / name_or_path).is_dir():
        return named / name_or_path
    raise ModelError(
        f"There is no model folder {name_or_path} and no model of that name.",
        hint=f"Known names: {', '.join(known_models())}. A trained model stands in the folder `model` of its run.",
    )


def known_models() -> dict[str, Path]:
    """Folders by name: the built-in model, then those under ``GALE_HOME/models``."""
    named = sorted((settings().home / "models").glob("*"))
    return {BUILTIN.name: BUILTIN} | {
        folder.name: folder for folder in named if folder.is_dir() and not folder.name.startswith(".")
    }
