"""The files around an SQLite database: its locks and the copy made before it changes shape."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from gale.core import files
from gale.core.errors import GaleError, StoreError


def make_private(path: Path) -> None:
    """Create the file if need be, readable by its owner only: conversations are private. Raises ``StoreError``."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # An existing file is not opened here: closing it would let go of locks that this process holds on it (POSIX).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


@contextlib.contextmanager
def only_server(path: Path) -> Iterator[None]:
    """Be the one server of this database. Raises :class:`StoreError` where another process is."""
    busy = StoreError(
        f"Another Gale server has the database {path} open.",
        hint="Stop that one, or give this one another --db. Several servers can share a PostgreSQL database.",
    )
    lock = path.resolve()  # one file under two names is still one database
    try:
        with files.locked(lock.with_name(f"{lock.name}.lock"), busy=busy):
            yield
    except StoreError:
        raise
    except GaleError as error:
        raise StoreError(error.message, hint=error.hint) from error


class WriteTurns:
    """Lets Gale's processes write to one database in turn.

    SQLite has a write lock of its own, but its versions before 3.51.3 can damage the file when a checkpoint of one
    connection meets a write of another (https://sqlite.org/wal.html#walresetbug). A checkpoint of ours runs at the
    end of a write, so under this lock the two never meet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def __enter__(self) -> WriteTurns:
        with _explained(self._path):
            lock = self._path.with_name(f"{self._path.name}.write-lock")
            self._handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._handle)

    @contextlib.contextmanager
    def held(self, deadline: float) -> Iterator[None]:
        """Hold the turn, waiting until ``time.monotonic()`` is ``deadline``. Raises :class:`StoreError`."""
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"The database ({self._path}) is locked.",
                        hint="Another Gale process writes to it for a long time; try again.",
                    ) from error
                time.sleep(0.002)
        try:
            yield
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)


def back_up(path: Path, copy: Path) -> None:
    """Copy the database to ``copy``, wholly or not at all; an older such copy goes. Raises :class:`StoreError`.

    The copy is what was committed, even while the caller holds the write lock.
    """
    try:
        with (
            files.new_file(copy, private=True) as temporary,
            contextlib.closing(sqlite3.connect(path)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as target,
        ):
            source.execute("PRAGMA query_only = ON")
            source.backup(target)
    except (GaleError, sqlite3.Error) as error:
        raise StoreError(
            f"No copy of {path} could be made, so it was not brought to its new shape: {error}",
            hint="Free some space in its folder. Nothing was changed.",
        ) from error
    for older in path.parent.glob(f"{glob.escape(path.name)}.before-*"):
        if older != copy:
            older.unlink()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(
            f"The database {path} cannot be opened: {reason}.",
            hint="It must be a file, in a folder, that may be read and written; choose another with --db.",
        ) from error
