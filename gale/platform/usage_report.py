"""What an organisation has used, minute by minute, hour by hour or day by day, by whom and of what."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, func, select

from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.database import Database
from gale.platform.usage import DAY_US, HOUR_US, SUMS

Width = Literal["1m", "1h", "1d"]
Axis = Literal["project_id", "user_id", "api_key_id", "model", "kind", "batch"]

WIDTHS: dict[Width, int] = {"1m": 60_000_000, "1h": HOUR_US, "1d": DAY_US}


@dataclass(frozen=True, slots=True)
class Question:
    """Usage from ``since`` until ``until`` (microseconds since 1970), in buckets of ``width``, as UTC divides time.

    ``only`` narrows an axis to some values, and sums are kept apart by the axes of ``by``.
    """

    since: int
    until: int
    width: Width
    by: tuple[Axis, ...] = ()
    only: Mapping[Axis, Collection[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Used:
    """Sums of one bucket: what tells them apart from others in it, by axis ("" for none), and how much."""

    bucket: int
    axes: dict[Axis, Any]
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_micro: int


class UsageReport:
    """The usage of ``actor``'s organisation, for those who administer it.

    Raises :class:`NotAllowedError`.
    """

    def __init__(self, database: Database, actor: Actor) -> None:
        authorize(actor, "administer")
        self._database = database
        self._organisation_id = actor.organisation_id

    async def answer(self, question: Question) -> list[Used]:
        """The sums there are, the oldest first. May raise :class:`StoreError`."""
        events = question.width == "1m"
        table = tables.usage_events if events else tables.usage_rollups
        time = table.c.created_at if events else table.c.hour
        width = WIDTHS[question.width]
        bucket = (time // width * width).label("bucket")
        axes = [func.coalesce(table.c[name], "") if name.endswith("_id") else table.c[name] for name in question.by]
        query = (
            select(bucket, *axes, *(func.sum(table.c[name]) for name in SUMS))
            .where(
                table.c.organisation_id == self._organisation_id,
                time >= question.since // width * width,
                time < question.until,
            )
            .group_by(bucket, *axes)
        )
        for name, values in question.only.items():
            query = query.where(table.c[name].in_(values))

        def work(connection: Connection) -> list[Used]:
            count = len(question.by)
            return [
                Used(int(row[0]), dict(zip(question.by, row[1 : 1 + count], strict=True)), *map(int, row[1 + count :]))
                for row in connection.execute(query)
            ]

        # Not by the database, whose order of names is that of its language.
        return sorted(await self._database.read(work), key=lambda used: (used.bucket, *used.axes.values()))
