"""What is kept for a while only is deleted few rows at once, so that nobody else's write waits long for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, delete, select

from gale.platform import tables
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.usage import DAY_US

AT_ONCE = 500
# How long the row of an upload is kept after its hour, in which alone it can be asked for.
UPLOAD_ROWS_US = DAY_US


async def prune(database: Database, usage_days: int) -> None:
    """Delete usage events of more than ``usage_days`` days ago, whose sums by hour stay, and rows of uploads that are
    over. May raise :class:`StoreError`."""
    now = now_us()
    events, organisations = tables.usage_events.c, tables.organisations.c
    for organisation_id in await database.read(lambda connection: list(connection.scalars(select(organisations.id)))):
        # One organisation after another, as the index has them.
        over = (events.organisation_id == organisation_id, events.created_at < now - usage_days * DAY_US)
        await _delete(database, tables.usage_events, over)
    await _delete(database, tables.uploads, (tables.uploads.c.expires_at < now - UPLOAD_ROWS_US,))


async def _delete(database: Database, table: Table, over: Sequence[ColumnElement[bool]]) -> None:
    query = select(table.c.id).where(*over).limit(AT_ONCE)

    def find(connection: Connection) -> list[Any]:
        return list(connection.scalars(query))

    while found := await database.read(find):
        statement = delete(table).where(table.c.id.in_(found))
        await database.write(lambda connection, statement=statement: connection.execute(statement))  # type: ignore[misc]
