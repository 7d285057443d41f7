"""SQLite: one file, one connection, one thread.

All statements run one after another in a thread of their own, so the event loop never waits for a disk. A statement
takes well under a millisecond, which one thread serves for far more people than one machine's model does.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError

from gale.core import files
from gale.core.errors import StoreError
from gale.platform.database import Database, Result
from gale.platform.migrate import check_ours, migrate, pending_revision
from gale.platform.sqlite_files import WriteTurns, back_up, make_private, only_server
from gale.platform.text import json_text

BUSY_TIMEOUT_S = 5.0
MIGRATION_TIMEOUT_S = 60.0

_HINTS = {
    sqlite3.SQLITE_CANTOPEN: "Check that the folder exists and may be written, or choose another with --db.",
    sqlite3.SQLITE_NOTADB: "Give --db another file; this one was left as it is.",
    sqlite3.SQLITE_READONLY: "Make the file and its folder writable, or choose another with --db.",
    sqlite3.SQLITE_BUSY: "Another program is writing to it; close that program or try again.",
    sqlite3.SQLITE_FULL: "Free some space; nothing that was stored is lost.",
    sqlite3.SQLITE_IOERR: "The disk refuses; look whether it is full, gone or broken.",
    sqlite3.SQLITE_CORRUPT: "The file is damaged; restore it from a backup.",
}


class SqliteDatabase(Database):
    """See :class:`Database`."""

    def __init__(self, path: Path | None, turns: WriteTurns | None, locks: contextlib.ExitStack) -> None:
        self._path = path
        self._turns = turns
        self._locks = locks
        self._engine = _engine(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gale-store")

    @classmethod
    def open_url(cls, url: URL, *, exclusive: bool = False) -> SqliteDatabase:
        """What :meth:`Database.open` promises, for ``sqlite:`` addresses."""
        path = path_from(url)
        turns = None
        with contextlib.ExitStack() as locks:
            if path is not None:
                make_private(path)
                turns = locks.enter_context(WriteTurns(path))
                if exclusive:
                    locks.enter_context(only_server(path))
                    _warn_of_old_sqlite()
            database = cls(path, turns, locks.pop_all())
        try:
            database._thread.submit(database._start).result()
        except BaseException:
            database.close()
            raise
        return database

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """See :meth:`Database.read`."""
        return await self._hand_over(self._read, work)

    async def write(self, work: Callable[[Connection], Result], *, durable: bool = False) -> Result:
        """See :meth:`Database.write`."""
        return await self._hand_over(self._write, work, durable)

    def close(self) -> None:
        """See :meth:`Database.close`."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._engine.dispose)
        self._thread.shutdown()
        self._locks.close()

    async def _hand_over(self, transact: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        # The time spent in the queue counts, so that a file that stays locked is not waited for one by one.
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        try:
            future = loop.run_in_executor(self._thread, partial(transact, *arguments, deadline))
        except RuntimeError as error:
            raise StoreError("The database is closed.") from error
        # Shielded, because cancelling would withdraw from the queue what the thread has not begun yet.
        return await asyncio.shield(future)

    def _start(self) -> None:
        deadline = time.monotonic() + MIGRATION_TIMEOUT_S
        self._read(check_ours, deadline)
        with self._explained(), self._turn(deadline), self._engine.connect() as connection:
            _use_write_ahead_log(connection)
        self._write(self._migrate, True, deadline)

    def _migrate(self, connection: Connection) -> None:
        check_ours(connection)
        revision = pending_revision(connection)
        if self._path and revision:
            # From a second connection, which reads what was committed while ours holds the write lock.
            back_up(self._path, self._path.with_name(f"{self._path.name}.before-{revision}"))
        migrate(connection)

    def _read(self, work: Callable[[Connection], Result], deadline: float) -> Result:
        with self._explained(), self._engine.connect() as connection:
            _set(connection, query_only=1, busy_timeout=_left_ms(deadline))
            connection.exec_driver_sql("BEGIN")
            result = work(connection)
            connection.commit()
            return result

    def _write(self, work: Callable[[Connection], Result], durable: bool, deadline: float) -> Result:
        with self._explained(), self._turn(deadline), self._engine.connect() as connection:
            # With a write-ahead log, NORMAL survives a killed process; only a power cut can lose the last moments.
            synchronous = "FULL" if durable else "NORMAL"
            _set(connection, query_only=0, synchronous=synchronous, busy_timeout=_left_ms(deadline))
            # The write lock is taken before ``work`` reads.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            result = work(connection)
            connection.commit()
            return result

    def _turn(self, deadline: float) -> contextlib.AbstractContextManager[None]:
        return self._turns.held(deadline) if self._turns else contextlib.nullcontext()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, sqlite3.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without what extends it
            if code == sqlite3.SQLITE_ERROR:  # a statement that is wrong: a bug, not the database's state
                raise
            name = self._path or "in memory"
            raise StoreError(f"The database ({name}) cannot be used: {cause}.", hint=_HINTS.get(code)) from error


def _engine(path: Path | None) -> Engine:
    url = URL.create("sqlite", database=str(path) if path else None)
    engine = create_engine(url, poolclass=StaticPool, json_serializer=json_text)
    event.listen(engine, "connect", _prepare_connection)
    return engine


def path_from(url: URL) -> Path | None:
    """The file that ``url`` names; None for a database in memory."""
    if url.query or url.host:
        raise StoreError(
            f"Gale cannot open {url.render_as_string(hide_password=True)}.",
            hint="A file is written as sqlite:///folder/gale.db, an absolute path with four slashes, without options.",
        )
    return None if url.database in (None, "", ":memory:") else files.expand(url.database or "").absolute()


def _prepare_connection(connection: Any, _record: object) -> None:
    # The driver would otherwise begin transactions by itself, at its own moments, and never around CREATE TABLE.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")


def _set(connection: Connection, **pragmas: object) -> None:
    """Set what holds for the next transaction; ``synchronous`` cannot be changed within one."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    for name, value in pragmas.items():
        driver.execute(f"PRAGMA {name} = {value}")


def _left_ms(deadline: float) -> int:
    return max(0, int((deadline - time.monotonic()) * 1000))


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


def _warn_of_old_sqlite() -> None:
    if not _can_damage_wal(sqlite3.sqlite_version_info):
        return
    structlog.get_logger().warning(
        f"SQLite {sqlite3.sqlite_version} can damage a file to which two programs write at once (its WAL-reset bug, "
        "mended in 3.51.3). Gale's own processes write in turns; let no other program write to this file."
    )


def _can_damage_wal(version: tuple[int, int, int]) -> bool:
    """Whether that bug is in this version (https://sqlite.org/wal.html#walresetbug)."""
    mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7, 0) and not mended
