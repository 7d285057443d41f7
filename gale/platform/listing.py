"""Lists page by page, as OpenAI's API has them: a page begins after the id that the last one ended with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import Connection, Row, Select, Table, tuple_

from gale.platform.errors import CursorError
from gale.platform.text import storable

Order = Literal["asc", "desc"]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Listing(Generic[Item]):
    """A page, and whether there is another behind it."""

    items: list[Item]
    has_more: bool


def page_of(
    connection: Connection,
    query: Select[Any],
    table: Table,
    *,
    limit: int,
    after: str | None = None,
    order: Order = "desc",
    by: str = "created_at",
) -> Listing[Row[Any]]:
    """At most ``limit`` rows of ``query`` (which names the tenant) in the order of ``table``'s column ``by``.

    Raises :class:`CursorError` where ``after`` is the id of none of its rows.
    """
    place = (table.c[by], table.c.id)
    if after is not None:
        # Found by the query itself: another tenant's id must look like one that does not exist.
        last = connection.execute(query.with_only_columns(*place).where(table.c.id == storable(after))).one_or_none()
        if last is None:
            raise CursorError(f"'{after[:100]}' is not in this list.", param="after")
        here, there = tuple_(*place), tuple_(*last)
        query = query.where(here < there if order == "desc" else here > there)
    ordered = [column.desc() if order == "desc" else column.asc() for column in place]
    rows = list(connection.execute(query.order_by(*ordered).limit(limit + 1)))
    return Listing(rows[:limit], len(rows) > limit)
