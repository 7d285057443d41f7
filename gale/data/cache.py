"""What recipes have made, kept under GALE_HOME and found again by content.

A training recipe may name a data recipe in place of prepared data, and a data recipe a tokenizer recipe in place of a
tokenizer; each is then made when first needed. The folder's name is a digest of the recipe, of every file it names and
of Gale's version, so a change in any of them makes it anew. A change in Gale's code between two versions does not: who
works on that removes the cache. Whoever asks second while an entry is being made waits for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gale
from gale.core import files
from gale.core.errors import DataError
from gale.core.recipe import Recipe
from gale.core.settings import settings
from gale.data.source_files import find_files, is_pattern

RecipeType = TypeVar("RecipeType", bound=Recipe)


def is_recipe(path: Path) -> bool:
    """Whether ``path`` names a recipe rather than what one makes."""
    return path.suffix == ".toml"


def made_once(recipe: RecipeType, make: Callable[[RecipeType, Path], Any], *, kind: str, marker: str) -> Path:
    """The folder that ``make(recipe, folder)`` has filled; ``marker`` is the file that shows it to be whole.

    Raises :class:`DataError` where a file that the recipe names does not exist.
    """
    digest = hashlib.sha256(json.dumps([gale.__version__, _by_content(recipe.model_dump())]).encode()).hexdigest()
    folder = settings().home / "cache" / f"{kind}-{digest[:16]}"
    if not (folder / marker).is_file():
        with files.locked(folder.with_suffix(".lock")):
            if not (folder / marker).is_file():  # another process may have made it meanwhile
                make(recipe, folder)
    return folder


def _by_content(value: Any) -> Any:
    """``value`` with every path replaced by its last part and the digest of what it names, ready for JSON."""
    if isinstance(value, dict):
        return {key: _by_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(item) for item in value]
    if not isinstance(value, Path):
        return value
    if value.is_dir():
        return [
            [str(file.relative_to(value)), files.sha256(file)] for file in sorted(value.rglob("*")) if file.is_file()
        ]
    if is_pattern(value):
        return [[file.path.name, files.sha256(file.path)] for file in find_files(value).files]
    if not value.is_file():
        raise DataError(f"There is no {value}.", hint="Check the paths in the recipe.")
    return [value.name, files.sha256(value)]
