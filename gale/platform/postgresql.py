"""PostgreSQL 15 or newer, for more than one process.

Connections of asyncpg belong to one event loop, while the store is opened before the server's loop begins. They
therefore live in a loop of their own in a thread of its own.

A write is a SERIALIZABLE transaction: where what it read was changed meanwhile, PostgreSQL undoes it and it is tried
again. The writes of one process go one at a time, as they do in SQLite, so that only processes can collide and not
a hundred requests; reads go beside them, each on its own snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import URL, Connection, NullPool
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from gale.core.errors import StoreError
from gale.platform.database import Database, Result
from gale.platform.loop_thread import LoopThread
from gale.platform.migrate import migrate
from gale.platform.postgresql_faults import BUSY, Fault, fault_of
from gale.platform.text import json_text

CONNECTIONS = 8
PATIENCE_S = 5.0  # for a connection, for locks of others, and until a conflict or a lost server is given up
QUEUE_TIMEOUT_S = 30.0  # for this process's own writes that came before
STATEMENT_TIMEOUT_S = 60.0
MIGRATION_TIMEOUT_S = 60.0

_MIGRATION_LOCK: Final = 0x67616C65  # "gale"
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


class PostgresqlDatabase(Database):
    """See :class:`Database`."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._name = url.set(query={}).render_as_string(hide_password=True)
        self._thread = LoopThread("gale-store")
        self._pool = create_async_engine(
            url,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=PATIENCE_S,
            json_serializer=json_text,
            connect_args=_connect_args(STATEMENT_TIMEOUT_S),
        )
        self._reading = self._pool.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writing = self._pool.execution_options(isolation_level="SERIALIZABLE")
        self._write_turn = asyncio.Lock()

    @classmethod
    def open_url(cls, url: URL) -> PostgresqlDatabase:
        """What :meth:`Database.open` promises, for ``postgresql:`` addresses."""
        database = cls(_checked(url))
        try:
            database._thread.submit(database._start).result()
        except BaseException:
            database.close()
            raise
        return database

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """See :meth:`Database.read`."""
        return await self._thread.run(lambda: self._transact(self._reading, work))

    async def write(self, work: Callable[[Connection], Result], *, durable: bool = False) -> Result:
        """See :meth:`Database.write`. ``durable`` changes nothing: the server decides, and by default always is."""
        return await self._thread.run(lambda: self._write(work))

    def close(self) -> None:
        """See :meth:`Database.close`."""
        self._thread.close(self._dispose)

    async def _dispose(self) -> None:
        with contextlib.suppress(TimeoutError, OSError):  # a server that is gone takes no leave
            await asyncio.wait_for(self._pool.dispose(), PATIENCE_S)

    async def _start(self) -> None:
        engine = create_async_engine(self._url, poolclass=NullPool, connect_args=_connect_args(None))
        try:
            await self._transact(engine, _check_and_migrate)
        finally:
            await engine.dispose()

    async def _write(self, work: Callable[[Connection], Result]) -> Result:
        try:
            await asyncio.wait_for(self._write_turn.acquire(), QUEUE_TIMEOUT_S)
        except TimeoutError as error:
            raise self._explained(BUSY) from error
        try:
            return await self._transact(self._writing, work)
        finally:
            self._write_turn.release()

    async def _transact(self, engine: AsyncEngine, work: Callable[[Connection], Result]) -> Result:
        """Run and commit ``work``, again where it certainly left nothing behind and patience is not at its end."""
        deadline, pause = time.monotonic() + PATIENCE_S, 0.002
        while True:
            connected = confirming = False
            try:
                async with engine.connect() as connection:
                    connected = True
                    result = await connection.run_sync(work)
                    confirming = True
                    await connection.commit()
                    return result
            except IntegrityError:
                raise
            except (DBAPIError, PoolTimeoutError, OSError) as error:
                fault = fault_of(error)
                if fault is None or (connected and isinstance(error, OSError) and not fault.lost):
                    raise
                if confirming and fault.lost:
                    raise StoreError(
                        f"{self._name} was lost while it confirmed a change, which it may or may not have kept.",
                        hint="Look before you try again.",
                    ) from error
                if not fault.passing or time.monotonic() > deadline:
                    raise self._explained(fault) from error
            # By chance, so that two that collided do not collide again.
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311
            pause = min(2 * pause, 0.2)

    def _explained(self, fault: Fault) -> StoreError:
        return StoreError(f"The database ({self._name}) cannot be used: {fault.reason}.", hint=fault.hint)


def _checked(url: URL) -> URL:
    """``url`` for asyncpg, with ``sslmode`` (as others write it) for its ``ssl``."""
    shown = url.render_as_string(hide_password=True)
    if not url.database:
        raise StoreError(f"{shown} names no database.", hint="Add it: postgresql+asyncpg://user@host/name.")
    query = {("ssl" if name == "sslmode" else name): value for name, value in url.query.items()}
    if set(query) - {"ssl", "host"} or query.get("ssl", "prefer") not in _SSL_MODES:
        raise StoreError(
            f"{shown} has options that are not understood.",
            hint=f"Understood are ssl= ({', '.join(_SSL_MODES)}) and host= (the folder of a local socket).",
        )
    return url.set(drivername="postgresql+asyncpg", query=query)


def _connect_args(statement_timeout_s: float | None) -> dict[str, Any]:
    return {
        "timeout": PATIENCE_S,
        "command_timeout": statement_timeout_s,
        "server_settings": {
            "application_name": "gale",
            "jit": "off",  # which costs our short statements more than it saves, above all asyncpg's first ones
            "lock_timeout": str(int(PATIENCE_S * 1000)),
        },
    }


def _check_and_migrate(connection: Connection) -> None:
    """Bring the database to its present shape, in one transaction that one process at a time can be in."""
    version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) // 10_000
    if version < 15:
        raise StoreError(f"This is PostgreSQL {version}.", hint="Gale needs PostgreSQL 15 or newer.")
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding != "UTF8":
        raise StoreError(
            f"This database keeps text as {encoding}, which has no place for every language.",
            hint="Make one with: CREATE DATABASE gale TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8'",
        )
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(MIGRATION_TIMEOUT_S * 1000)}")
    # Each statement of a READ COMMITTED transaction sees what was committed before it: after the lock is ours, what
    # the process that held it made of the database.
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
    migrate(connection)
