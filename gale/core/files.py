"""Files that are either wholly there or not there at all.

A reader (or a process started after a crash) must never meet half a file, so everything that matters is
written beside its place under a temporary name, flushed to disk and renamed over it: POSIX ``rename`` is
atomic within one file system.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gale.core.errors import GaleError


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a message that names the place and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GaleError(f"No space left while writing {path}.", hint="Free some space; nothing old was lost.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GaleError(f"Not allowed to write {path}.", hint="Choose another folder, for example with --out.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise GaleError(f"{path} cannot be made: a file stands where a folder is needed.") from error
        raise


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Atomically replace ``path`` with ``content``."""
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files private; what we write is meant to be as readable as any other file.
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        fsync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    """Atomically replace ``path`` with ``content`` in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Atomically replace ``path`` with readable JSON; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes ``path`` only when the block ends without an error.

    An existing ``path`` is replaced. Between removing the old folder and renaming the new one there is an
    instant without either, so folders whose history matters (checkpoints) get a new name each time instead.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for root, _, names in os.walk(temporary):
                for name in names:
                    with open(Path(root) / name, "rb") as file:
                        os.fsync(file.fileno())
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            fsync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
