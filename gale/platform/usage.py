"""What was used: one event for a request, summed up hour by hour, each exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from gale.core.errors import StoreError
from gale.platform import tables
from gale.platform.scopes import Scope, scopes

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
# SQLite takes 32,766 values in a statement, older ones 999.
_AT_ONCE = 500

AXES = ("organisation_id", "project_id", "user_id", "api_key_id", "model", "kind", "batch")
SUMS = ("requests", "input_tokens", "cached_tokens", "output_tokens", "cost_micro")


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """What one request used. ``created_at`` in microseconds since 1970; ``requests`` as an HTTP client counts them."""

    id: str
    created_at: int
    organisation_id: str
    project_id: str
    user_id: str | None
    api_key_id: str | None
    model: str
    kind: str
    batch: int
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_micro: int
    request_id: str | None

    def __add__(self, other: UsageEvent) -> UsageEvent:
        """Both as one event, under the first one's id."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in SUMS})

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Whose budgets it is charged to."""
        return scopes(self.organisation_id, self.project_id, self.api_key_id)


def write_events(connection: Connection, events: Sequence[UsageEvent]) -> list[UsageEvent]:
    """Write those that are not there yet, sum them up, and return them. May raise :class:`StoreError`."""
    table = tables.usage_events
    known: set[str] = set()
    for low in range(0, len(events), _AT_ONCE):
        ids = [event.id for event in events[low : low + _AT_ONCE]]
        known.update(connection.scalars(select(table.c.id).where(table.c.id.in_(ids))))
    new = list({event.id: event for event in events if event.id not in known}.values())
    try:
        if new:
            connection.execute(insert(table), [asdict(event) for event in new])
            _sum_up(connection, new)
    except IntegrityError as error:  # another process has just begun the same hour
        raise StoreError("Two servers wrote usage at once; try again.") from error
    return new


def requests_by_hour(connection: Connection, scope: Scope, model: str, since: int) -> list[tuple[int, int]]:
    """Hours from ``since`` on with the requests in them, of ``model`` ("" for all) and without those of batches."""
    table = tables.usage_rollups
    column = {"organisation": "organisation_id", "project": "project_id", "key": "api_key_id"}[scope[0]]
    query = select(table.c.hour, func.sum(table.c.requests)).where(
        table.c[column] == scope[1], table.c.hour >= since, table.c.batch == 0
    )
    if model:
        query = query.where(table.c.model == model)
    rows = connection.execute(query.group_by(table.c.hour).order_by(table.c.hour))
    return [(int(hour), int(requests)) for hour, requests in rows]


def _sum_up(connection: Connection, events: Sequence[UsageEvent]) -> None:
    table = tables.usage_rollups
    totals: dict[tuple[Any, ...], list[int]] = {}
    for event in events:
        hour = event.created_at // HOUR_US * HOUR_US
        # Without null, which is not unique.
        axes = (hour, *(getattr(event, name) if name == "batch" else getattr(event, name) or "" for name in AXES))
        sums = totals.setdefault(axes, [0] * len(SUMS))
        for place, name in enumerate(SUMS):
            sums[place] += getattr(event, name)
    for axes, sums in totals.items():
        here = [table.c[name] == value for name, value in zip(("hour", *AXES), axes, strict=True)]
        added = {name: table.c[name] + value for name, value in zip(SUMS, sums, strict=True)}
        if connection.execute(update(table).where(*here).values(**added)).rowcount == 0:
            row = {**dict(zip(("hour", *AXES), axes, strict=True)), **dict(zip(SUMS, sums, strict=True))}
            connection.execute(insert(table).values(**row))
