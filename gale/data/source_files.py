"""Which files a source's path stands for, and how each of them is read."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gale.core import files
from gale.core.errors import DataError

FileKind = Literal["jsonl", "parquet", "text", "markdown", "html"]
_KINDS: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}
_PACKED = (".gz", ".zst")
_OFFICE = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".ppt", ".pptx", ".xls", ".xlsx")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file and how to read it."""

    path: Path
    kind: FileKind


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """The files that a path stands for, in the order they are read, and those of a folder that are passed over.

    ``outside`` are links of the folder to what lies elsewhere.
    """

    files: tuple[SourceFile, ...]
    ignored: tuple[Path, ...] = ()
    outside: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.path.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """SHA-256 of the file, or over names and contents where there are several."""
        if len(self.files) == 1:
            return files.sha256(self.files[0].path)
        return files.sha256_of_all(file.path for file in self.files)


def find_files(path: Path, kind: FileKind | None = None) -> FoundFiles:
    """The files of ``path``: itself, all below it if it is a folder, or all that match it as a pattern, sorted.

    Below a folder, and by a pattern, hidden files and those of no known kind are passed over. So are links that lead
    out of the folder (or out of the last one before the pattern's first ``*``): a folder that comes from elsewhere must
    not bring what lies on this machine into the data. ``kind`` makes every file one of that kind.
    Raises :class:`DataError` where nothing is found, or where something can't be read yet.
    """
    outside: list[Path] = []
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found, outside = _below(path, path.rglob("*"))
    elif is_pattern(path):
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        found, outside = _below(fixed, fixed.glob(str(path.relative_to(fixed))))
    else:
        raise DataError(f"There is no data file {path}.", hint="Check the path in the recipe.")
    if kind is None and (office := [file for file in found if file.suffix.lower() in _OFFICE]):
        raise DataError(
            f"{office[0]} is a {office[0].suffix.lower()} file, which Gale cannot read yet"
            + (f" (nor the {len(office) - 1} others like it)." if len(office) > 1 else "."),
            hint="Save it as text, Markdown or HTML, or choose other files with a pattern such as notes/*.md.",
        )
    known, ignored = [], []
    for file in found:
        chosen = kind or _KINDS.get(_suffix(file)) or ("jsonl" if file == path else None)
        if chosen:
            known.append(SourceFile(file, chosen))
        else:
            ignored.append(file)
    if not known:
        raise DataError(
            f"{path} {'matches' if is_pattern(path) else 'holds'} no file of a known kind "
            f"({', '.join(sorted(_KINDS))}, plain or packed as .gz or .zst)"
            + (f"; {len(outside)} links lead out of the folder, such as {outside[0]}." if outside else "."),
            hint="Give the path that the links lead to." if outside else "Check the path, or set `kind`.",
        )
    return FoundFiles(tuple(known), tuple(ignored), tuple(outside))


def missing_paths(paths: Iterable[Path]) -> list[str]:
    """Those that are no file, no folder and no pattern, so that all can be named at once."""
    return [str(path) for path in paths if not path.exists() and not is_pattern(path)]


def is_pattern(path: Path) -> bool:
    """Whether ``path`` is to be matched: it holds ``*``, ``?`` or ``[`` and is no file or folder itself."""
    return glob.has_magic(str(path)) and not path.exists()


def _suffix(path: Path) -> str:
    if path.suffix.lower() in _PACKED:
        path = path.with_suffix("")
    return path.suffix.lower()


def _below(folder: Path, paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The files among ``paths`` that are not hidden, sorted: those that lie below ``folder``, and links out of it."""
    home = folder.resolve()
    inside: list[Path] = []
    outside: list[Path] = []
    for file in sorted(path for path in paths if path.is_file() and not _hidden(path, folder)):
        (inside if file.resolve().is_relative_to(home) else outside).append(file)
    return inside, outside


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
