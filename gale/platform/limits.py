"""Rate limits as they are kept: so many requests, tokens and requests at once, for whom and for which model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, insert, select

from gale.core.errors import GaleError
from gale.platform import tables
from gale.platform.database import Database
from gale.platform.scopes import Scope

Measure = Literal["requests", "tokens"]


class LimitExceededError(GaleError):
    """More than a limit allows. ``wait_s`` seconds from now it may go; None where it never can."""

    def __init__(self, message: str, measure: Measure, wait_s: float | None) -> None:
        super().__init__(message)
        self.measure: Measure = measure
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Limit:
    """What one scope may use of ``model`` ("": of all models together). None is no limit."""

    scope: Scope
    model: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    concurrency: int | None = None

    @property
    def values(self) -> dict[str, int | None]:
        """The limits by name."""
        return {name: getattr(self, name) for name in LIMIT_NAMES}


LIMIT_NAMES = tuple(field.name for field in fields(Limit) if field.name not in ("scope", "model"))


class Limits:
    """The limits of one database. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of(self, scope: Scope) -> list[Limit]:
        """The limits of ``scope``, that for all models first."""
        return await self._database.read(lambda connection: [_limit(row) for row in _rows(connection, scope)])

    async def change(self, scope: Scope, model: str, values: dict[str, int | None]) -> Limit:
        """Set some limits by name (None lifts one) and leave the others as they are."""
        table = tables.limits

        def work(connection: Connection) -> Limit:
            old = next((_limit(row) for row in _rows(connection, scope) if row.model == model), Limit(scope, model))
            new = Limit(scope, model, **{**old.values, **values})
            connection.execute(
                delete(table).where(table.c.scope == scope[0], table.c.scope_id == scope[1], table.c.model == model)
            )
            if any(value is not None for value in new.values.values()):
                connection.execute(insert(table).values(scope=scope[0], scope_id=scope[1], model=model, **new.values))
            return new

        return await self._database.write(work)


def read_limits(connection: Connection) -> list[Limit]:
    """All limits there are."""
    return [_limit(row) for row in connection.execute(select(tables.limits))]


def _rows(connection: Connection, scope: Scope) -> list[Row[Any]]:
    table = tables.limits
    query = select(table).where(table.c.scope == scope[0], table.c.scope_id == scope[1]).order_by(table.c.model)
    return list(connection.execute(query))


def _limit(row: Row[Any]) -> Limit:
    return Limit((row.scope, row.scope_id), row.model, **{name: getattr(row, name) for name in LIMIT_NAMES})
