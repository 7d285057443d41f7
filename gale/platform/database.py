"""The database behind the store: SQLite in a file of one's own, or PostgreSQL for more than one process.

Both are used in one way: a function of a connection is handed over and runs as one transaction, away from the event
loop. What such a function may do is the same on both, and narrow, so that it is written once:

- It uses its connection and nothing else that changes. Where two processes collide, PostgreSQL undoes one of them
  and the function runs again.
- It meets a broken constraint as ``sqlalchemy.exc.IntegrityError``. To go on after one it needs
  ``connection.begin_nested()``, because PostgreSQL ends the transaction otherwise.
- In :meth:`Database.read` it does not write; both refuse that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, make_url
from sqlalchemy.exc import ArgumentError

from gale.core.errors import StoreError

Result = TypeVar("Result")

_EXAMPLES = (
    "Write it as sqlite:///folder/gale.db (an absolute path has four slashes) or postgresql+asyncpg://user@host/name."
)


class Database(ABC):
    """An open, migrated database. Use :meth:`open`; ``close`` when done."""

    @staticmethod
    def open(url: str, *, exclusive: bool = False) -> Database:
        """Open ``sqlite:///path``, ``sqlite://`` (in memory) or ``postgresql+asyncpg://user:password@host/name``.

        It is created (SQLite) and migrated as needed. ``exclusive`` is for the server: no second server may open the
        same SQLite file until this one closes it, while the command line still may. Blocks. Raises
        :class:`StoreError` for an address that is not understood, a database that cannot be reached, read or
        written, and one of another program or of a newer Gale.
        """
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise StoreError("This is not a database address.", hint=_EXAMPLES) from error
        # Imported here, so that who uses one does not wait for the other.
        match parsed.drivername:
            case "sqlite" | "sqlite+pysqlite":
                from gale.platform.sqlite import SqliteDatabase

                return SqliteDatabase.open_url(parsed, exclusive=exclusive)
            case "postgresql" | "postgres" | "postgresql+asyncpg":
                from gale.platform.postgresql import PostgresqlDatabase

                return PostgresqlDatabase.open_url(parsed)
        raise StoreError(f"Gale cannot open {parsed.render_as_string(hide_password=True)}.", hint=_EXAMPLES)

    @abstractmethod
    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """Run ``work`` on one consistent view of the data. Raises :class:`StoreError`."""

    @abstractmethod
    async def write(self, work: Callable[[Connection], Result], *, durable: bool = False) -> Result:
        """Run ``work`` and commit, or change nothing where it raises. Raises :class:`StoreError`.

        What ``work`` reads still holds when it writes. Once handed over it is finished even if the caller is
        cancelled. What returned survives a killed process, and with ``durable`` a power cut too (PostgreSQL as it is
        set up by default survives that always).
        """

    @abstractmethod
    def close(self) -> None:
        """Finish what was handed over and close. May be called again. Blocks."""
