"""Rate limits as they are kept: so many requests, tokens and requests at once, for whom and for which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, insert, select

from gale.core.errors import GaleError
from gale.platform import tables
from gale.platform.scopes import Scope

Measure = Literal["requests", "tokens"]


class LimitExceededError(GaleError):
    """More than a limit allows. ``wait_s`` seconds from now it may go; None where waiting alone does not help."""

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


def read_limits(connection: Connection) -> list[Limit]:
    """All limits there are."""
    return [_limit(row) for row in connection.execute(select(tables.limits))]


def limits_of(connection: Connection, scope: Scope) -> list[Limit]:
    """The limits of ``scope``, that for all models first."""
    table = tables.limits
    query = select(table).where(table.c.scope == scope[0], table.c.scope_id == scope[1])
    # Not by the database, whose order of names is that of its language.
    return sorted((_limit(row) for row in connection.execute(query)), key=lambda limit: limit.model)


def change_limits(connection: Connection, scope: Scope, model: str, values: Mapping[str, int | None]) -> Limit:
    """Set some limits by name (None lifts one) and leave the others as they are."""
    table = tables.limits
    here = {"scope": scope[0], "scope_id": scope[1], "model": model}
    old = next((each for each in limits_of(connection, scope) if each.model == model), Limit(scope, model))
    new = Limit(scope, model, **{**old.values, **values})
    connection.execute(delete(table).where(*[table.c[name] == value for name, value in here.items()]))
    if any(value is not None for value in new.values.values()):
        connection.execute(insert(table).values(**here, **new.values))
    return new


def _limit(row: Row[Any]) -> Limit:
    return Limit((row.scope, row.scope_id), row.model, **{name: getattr(row, name) for name in LIMIT_NAMES})
