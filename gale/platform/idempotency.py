"""Answers kept for requests that are sent again: whoever gives a request a key gets one answer for it, once made.

While a request is being answered its row says so for a short time that is prolonged meanwhile, so that after a killed
process the key is soon free again.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from gale.platform import tables
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.text import storable

KEPT_S = 24 * 3600.0
IN_PROGRESS_S = 30.0
_TABLE = tables.idempotency


@dataclass(frozen=True, slots=True)
class Earlier:
    """The same key's earlier request. ``status`` None: it is being answered. ``response`` None: too long to keep."""

    request_sha256: str
    status: int | None
    response: str | None


class Idempotency:
    """The keys of all projects. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, project_id: str, key: str, request_sha256: str) -> Earlier | None:
        """Take the key for a request; where another has it, that one."""
        now = now_us()

        def work(connection: Connection) -> Earlier | None:
            here = (_TABLE.c.project_id == project_id) & (_TABLE.c.key == storable(key))
            connection.execute(delete(_TABLE).where(here, _TABLE.c.expires_at <= now))
            columns = (_TABLE.c.request_sha256, _TABLE.c.status, _TABLE.c.response)
            row = connection.execute(select(*columns).where(here)).one_or_none()
            if row is not None:
                return Earlier(*tuple(row))
            connection.execute(
                insert(_TABLE).values(
                    project_id=project_id,
                    key=storable(key),
                    request_sha256=request_sha256,
                    expires_at=now + int(IN_PROGRESS_S * 1_000_000),
                )
            )
            return None

        return await self._database.write(work)

    async def prolong(self, project_id: str, key: str) -> None:
        """The request is still being answered."""
        await self._set(project_id, key, expires_at=now_us() + int(IN_PROGRESS_S * 1_000_000))

    async def finish(self, project_id: str, key: str, status: int, response: str | None) -> None:
        """Keep the answer."""
        await self._set(
            project_id, key, status=status, response=response, expires_at=now_us() + int(KEPT_S * 1_000_000)
        )

    async def abandon(self, project_id: str, key: str) -> None:
        """Nothing came of it: the key is free."""
        await self._database.write(
            lambda connection: connection.execute(
                delete(_TABLE).where(_TABLE.c.project_id == project_id, _TABLE.c.key == storable(key))
            )
        )

    async def sweep(self) -> None:
        """Forget what is over."""
        now = now_us()
        await self._database.write(
            lambda connection: connection.execute(delete(_TABLE).where(_TABLE.c.expires_at <= now))
        )

    async def _set(self, project_id: str, key: str, **values: int | str | None) -> None:
        await self._database.write(
            lambda connection: connection.execute(
                update(_TABLE).where(_TABLE.c.project_id == project_id, _TABLE.c.key == storable(key)).values(**values)
            )
        )
