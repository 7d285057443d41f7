"""Files that are either wholly there or not there at all.

A reader (or a process started after a crash) must never meet half a file, so everything that matters is
written beside its place under a temporary name, flushed to disk and renamed over it: POSIX ``rename`` is
atomic within one file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gale.core.errors import GaleError

# Asked once, since asking is changing it for an instant, in which another thread may make a file.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def expand(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~name`` replaced by that person's home. Raises :class:`GaleError`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise GaleError(f"{path} cannot be followed: there is no such home folder.") from error


def resolve(path: str | Path, folder: Path | None = None) -> Path:
    """``path`` expanded, absolute and without links, counted from ``folder`` or else the working directory.

    Raises :class:`GaleError` where that leads nowhere.
    """
    try:
        return ((folder or Path()) / expand(path)).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise GaleError(f"{path} cannot be followed: {error}") from error


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a message that names the place and the cure."""
    try:
        yield
    except OSError as error:
        hint: str | None = None
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                message, hint = f"No space left while writing {path}.", "Free some space; nothing old was lost."
            case errno.EACCES | errno.EPERM | errno.EROFS:
                message, hint = f"Not allowed to write {path}.", "Choose another folder, for example with --out."
            case errno.ENOTDIR | errno.EEXIST | errno.EISDIR:
                message = f"{path} cannot be made: something else stands in its place."
            case errno.ENAMETOOLONG | errno.ELOOP | errno.EIO:
                message = f"{path} cannot be written: {error.strerror}."
            case _:
                raise
        raise GaleError(message, hint=hint) from error


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files private; what we write is meant to be as readable as any other file.
            temporary.chmod(0o666 & ~_UMASK)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    """Atomically replace ``path`` with ``content`` in UTF-8; a half character, which that has no place for, is a ``?``.

    Such come from file names that are not UTF-8 and from rows of data; no report may be lost for them.
    """
    write_bytes(path, content.encode("utf-8", "replace"))


def write_json(path: Path, content: Any) -> None:
    """Atomically replace ``path`` with readable JSON; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Fill a temporary file, piece by piece, that atomically becomes ``path`` when the block ends without an error.

    A ``private`` one can be read by its owner only, at every moment.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        # Random as well: on a disk that machines or containers share, another process has the same number.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}-")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o600 if private else 0o666 & ~_UMASK)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Fill a temporary folder that becomes ``path`` only when the block ends without an error.

    An existing ``path`` is replaced; with ``marker`` only where it is empty or holds a file of that name, so that a
    mistyped --out costs nobody their folder. Between moving the old folder away and the new one to its place there
    is an instant without either, so folders whose history matters (checkpoints) get a new name each time instead.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if marker and path.exists() and not (path / marker).is_file() and any(path.iterdir()):
            raise GaleError(f"{path} holds something else and is not replaced.", hint="Choose another --out.")
        remove_leftovers(path)
        prefix = f".{path.name}.{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            temporary.chmod(0o777 & ~_UMASK)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
            fsync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_to_replace(out: Path, *sources: Path) -> None:
    """Raise :class:`GaleError` where a folder that becomes ``out`` would replace what it is made from."""
    if any(source.resolve().is_relative_to(out.resolve()) for source in sources):
        raise GaleError(f"{out} holds what is being read and is not replaced.", hint="Choose another --out.")


def remove_leftovers(path: Path) -> None:
    """Remove what writes of ``path`` left beside it when the process was killed in the middle of one.

    Their names hold the number of that process. What a living one may still be writing stays, and so do hidden files
    that only begin alike: beside a folder ``env`` stands somebody's ``.env.local``.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        process = leftover.name.removeprefix(f".{path.name}.").partition("-")[0]
        if not (process.isascii() and process.isdecimal()) or _is_alive(int(process)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, busy: GaleError | None = None) -> Iterator[None]:
    """Hold the lock file ``path``, which the system lets go when the process ends, however it ends.

    Where another process holds it, raise ``busy``, or wait if there is none.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with explain_disk_errors(path):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except OSError as error:
                if busy and isinstance(error, BlockingIOError):
                    raise busy from None
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # some network file systems
                    raise
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 over the names and contents of files, in the order of their paths."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name} {sha256(path)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another person's
        return True
    return True
