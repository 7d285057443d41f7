"""One database, one connection, one thread.

All statements run one after another in a thread of their own, so the event loop never waits for a disk and SQLite
never sees two writing connections of ours (its versions before 3.51.3 can damage a WAL that two connections reset
at the same moment). A statement takes well under a millisecond, which one thread serves for far more people than
one machine's model does. A transaction once handed over is finished even if its caller is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from gale.core import files
from gale.core.errors import StoreError
from gale.platform.migrate import check_ours, migrate

BUSY_TIMEOUT_S = 5.0
MIGRATION_TIMEOUT_S = 60.0

Result = TypeVar("Result")

_HINTS = {
    "unable to open database file": "Check that the folder exists and may be written, or choose another with --db.",
    "file is not a database": "Give --db another file; this one was left as it is.",
    "readonly database": "Make the file and its folder writable, or choose another with --db.",
    "database is locked": "Another program is writing to it; close that program or try again.",
    "disk is full": "Free some space; nothing that was stored is lost.",
    "malformed": "The file is damaged; restore it from a backup.",
}


class Database:
    """An open, migrated database. Use :meth:`open`; ``close`` when done."""

    def __init__(self, engine: Engine, thread: ThreadPoolExecutor, name: str) -> None:
        self._engine = engine
        self._thread = thread
        self._name = name

    @classmethod
    def open(cls, url: str) -> Database:
        """Open ``sqlite:///path`` (or ``sqlite://`` for one in memory), creating and migrating it as needed.

        Raises :class:`StoreError` for an address that is not understood, a file that cannot be opened, read or
        written, and a database of another program or of a newer Gale.
        """
        path = _path_from(url)
        if path is not None:
            _make_private_file(path)
        engine = create_engine(URL.create("sqlite", database=str(path) if path else None), poolclass=StaticPool)
        event.listen(engine, "connect", _prepare_connection)
        database = cls(engine, ThreadPoolExecutor(1, thread_name_prefix="gale-store"), str(path or "in memory"))
        try:
            database._thread.submit(database._start).result()
        except BaseException:
            database.close()
            raise
        return database

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` on one consistent view of the data. Raises :class:`StoreError`."""
        return await self._hand_over("BEGIN", work)

    async def write(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` and commit, or change nothing where it raises. Raises :class:`StoreError`.

        The write lock is taken before ``work`` reads, so what it read still holds when it writes.
        """
        return await self._hand_over("BEGIN IMMEDIATE", work)

    def close(self) -> None:
        """Finish what was handed over and close the file."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._engine.dispose)
        self._thread.shutdown()

    async def _hand_over(self, begin: str, work: Callable[[Connection], Result]) -> Result:
        # Shielded, because cancelling would withdraw from the queue what the thread has not begun yet.
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, self._transact, begin, work))

    def _start(self) -> None:
        self._transact("BEGIN", check_ours)
        with self._explained(), self._engine.connect() as connection:
            _use_write_ahead_log(connection)
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(MIGRATION_TIMEOUT_S * 1000)}")
        self._transact("BEGIN IMMEDIATE", migrate)
        with self._explained(), self._engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")

    def _transact(self, begin: str, work: Callable[[Connection], Result]) -> Result:
        with self._explained(), self._engine.connect() as connection:
            connection.exec_driver_sql(begin)
            result = work(connection)
            connection.commit()
            return result

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            reason = str(error.orig)
            hint = next((hint for part, hint in _HINTS.items() if part in reason), None)
            raise StoreError(f"The database ({self._name}) cannot be used: {reason}.", hint=hint) from error


def _path_from(url: str) -> Path | None:
    """The file that ``url`` names; None for a database in memory."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError(
            f"{url!r} is not a database address.",
            hint="Write it as sqlite:///folder/gale.db (an absolute path has four slashes).",
        ) from error
    if parsed.get_backend_name() != "sqlite" or parsed.query or parsed.host:
        raise StoreError(
            f"Gale cannot open {parsed.render_as_string(hide_password=True)}.",
            hint="This version keeps everything in SQLite: sqlite:///folder/gale.db",
        )
    return None if parsed.database in (None, "", ":memory:") else files.expand(parsed.database or "").absolute()


def _make_private_file(path: Path) -> None:
    """Create the file if need be, readable by its owner only: conversations are private."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(
            f"The database {path} cannot be opened: {reason}.",
            hint="It must be a file, in a folder, that may be read and written; choose another with --db.",
        ) from error


def _prepare_connection(connection: Any, _record: object) -> None:
    # The driver would otherwise begin transactions by itself, at its own moments, and never around CREATE TABLE.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    connection.execute("PRAGMA foreign_keys = ON")
    # With a write-ahead log, NORMAL survives a killed process; only a power cut can lose the last moments.
    connection.execute("PRAGMA synchronous = NORMAL")


def _use_write_ahead_log(connection: Connection) -> None:
    """Let other processes read while we write. The setting stays in the file."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            return
        except DBAPIError as error:
            # SQLite does not apply the busy time-out to this one statement when two processes change it together.
            locked = isinstance(error.orig, sqlite3.OperationalError) and "locked" in str(error.orig)
            if not locked or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
