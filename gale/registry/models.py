"""Finding a model by name: the built-in one, one under ``GALE_HOME/models``, any folder, or any GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import structlog

from gale.core import files
from gale.core.errors import ModelError
from gale.core.settings import settings

log = structlog.get_logger()

BUILTIN = Path(__file__).parent / "builtin" / "gale-0"
# A classifier, which answers nothing: found by its name, but no model to choose from.
MODERATION = BUILTIN.parent / "gale-moderation"


def resolve_model(name_or_path: str | None) -> Path:
    """The folder of a model; None means the built-in one. Raises :class:`ModelError` where there is none.

    A folder of that path wins over a model of that name, as a shell user would expect. A GGUF file is unpacked into a
    folder under ``GALE_HOME/cache``, once.
    """
    if name_or_path is None:
        return BUILTIN
    path = files.expand(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        return _unpacked(files.resolve(path))
    named = settings().home / "models"
    for built_in in (BUILTIN, MODERATION):
        if name_or_path == built_in.name:
            return built_in
    if Path(name_or_path).name == name_or_path and (named / name_or_path).is_dir():
        return named / name_or_path
    raise ModelError(
        f"There is no model folder {name_or_path} and no model of that name.",
        hint=f"Known names: {', '.join(known_models())}. A trained model stands in the folder `model` of its run.",
    )


def _unpacked(path: Path) -> Path:
    """The folder of a GGUF file, made anew where the file has changed. Raises :class:`ModelError`."""
    from gale.model.gguf_import import convert_gguf  # only they who have such a file wait for it

    status = path.stat()
    key = hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    folder = settings().home / "cache" / "gguf" / key.hexdigest()[:16] / path.stem
    with files.locked(folder.parent.parent / "lock"):  # two servers may start on the same file
        if not folder.is_dir():
            log.info("gguf_unpacking", file=str(path), into=str(folder))
            with files.new_directory(folder) as target:
                convert_gguf(path, target)
    return folder


def known_models() -> dict[str, Path]:
    """Folders by name: the built-in model, then those under ``GALE_HOME/models``."""
    named = sorted((settings().home / "models").glob("*"))
    return {BUILTIN.name: BUILTIN} | {
        folder.name: folder for folder in named if folder.is_dir() and not folder.name.startswith(".")
    }
