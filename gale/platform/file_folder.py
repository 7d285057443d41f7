"""The bytes of uploaded files: a folder in which each lies whole under its id, or not at all.

``incoming`` holds what is being written; ``parts/<upload>`` the parts of uploads that are not complete;
``batches/<id>`` the answers of a batch at work; everything else are files. Nothing here knows a database, several of
which may share the folder: what the rows are for is removed by their names, what never got a row by its age alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gale.core.files import fsync_directory
from gale.platform.errors import FileTooLargeError, NoSpaceError

# What nobody wrote to for so long was left by a process that is no more.
ABANDONED_S = 4 * 3600.0
_PIECE = 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Digest:
    """What was written: how many bytes, and their hashes in hexadecimal."""

    size: int
    sha256: str
    md5: str


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn a full disk into :class:`NoSpaceError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoSpaceError("The server has no space left for this file. Nothing of it was kept.") from error


class IncomingFile:
    """A file being written. Blocks: for a thread. Removed at the end of its ``with`` unless it was :meth:`kept`."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._most = most_bytes
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)
        with explained():
            _make_private(folder)
            handle, name = tempfile.mkstemp(dir=folder)
        self._path = Path(name)
        self._file = os.fdopen(handle, "wb", buffering=0)

    def __enter__(self) -> IncomingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add ``data``. Raises :class:`FileTooLargeError` or :class:`NoSpaceError`."""
        self._size += len(data)
        if self._size > self._most:
            raise FileTooLargeError(f"The file is larger than {self._most:,} bytes.")
        self._sha256.update(data)
        self._md5.update(data)
        rest = memoryview(data)
        with explained():
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self) -> Digest:
        """Make sure that it is on the disk."""
        with explained():
            os.fsync(self._file.fileno())
        return Digest(self._size, self._sha256.hexdigest(), self._md5.hexdigest())

    def keep(self, path: Path) -> None:
        """Give it its place."""
        place(self._path, path)

    def close(self) -> None:
        """Remove it, unless it has its place."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class FileFolder:
    """See the module. Made when the first file comes; only its owner may look into it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, file_id: str) -> Path:
        """Where the bytes of ``file_id`` lie: 256 folders, so that none grows too long."""
        return self.root / hashlib.sha256(file_id.encode()).hexdigest()[:2] / file_id

    def part_path(self, upload_id: str, part_id: str) -> Path:
        """Where a part of an upload lies."""
        return self.root / "parts" / upload_id / part_id

    def batch_path(self, batch_id: str) -> Path:
        """The folder of a batch at work."""
        return self.root / "batches" / batch_id

    def incoming(self, most_bytes: int) -> IncomingFile:
        """A new file of at most ``most_bytes``."""
        return IncomingFile(self.root / "incoming", most_bytes)

    def remove(self, file_id: str) -> None:
        """Remove a file that may be there."""
        self.path(file_id).unlink(missing_ok=True)

    def remove_parts(self, upload_id: str) -> None:
        """Remove all parts of an upload."""
        shutil.rmtree(self.root / "parts" / upload_id, ignore_errors=True)

    def remove_batch(self, batch_id: str) -> None:
        """Remove what a batch kept while it worked."""
        shutil.rmtree(self.batch_path(batch_id), ignore_errors=True)

    def sweep(self, abandoned_s: float = ABANDONED_S) -> None:
        """Remove what killed processes left half written, and parts of uploads that must long be over."""
        before = time.time() - abandoned_s
        for path in (*_children(self.root / "incoming"), *_children(self.root / "parts")):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps as well, or was not abandoned
                if path.stat().st_mtime <= before:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def digest(path: Path) -> Digest:
    """The hashes of a file that is there. Blocks."""
    size, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            sha256.update(piece)
            md5.update(piece)
    return Digest(size, sha256.hexdigest(), md5.hexdigest())


def place(source: Path, path: Path) -> None:
    """Move a file that is on the disk to ``path``, so that it stays there after a power cut."""
    with explained():
        _make_private(path.parent)
        source.replace(path)
        fsync_directory(path.parent)


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
