"""What a project takes of the disk, counted in the transaction that takes more, so that no two pass together.

A file counts from before its bytes get their place until after they are removed. An upload counts twice what was
announced, once for its parts (or for these, where more were sent) and once for the file that is made of them, until the
file counts by itself; its parts count until they are removed, which for one that expired is done when space is short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, and_, func, or_, select, update

from gale.platform import tables
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import StorageQuotaError
from gale.platform.file_folder import ABANDONED_S, FileFolder

Result = TypeVar("Result")

OPEN = ("pending", "completing")
_FILES, _UPLOADS, _PARTS = tables.files, tables.uploads, tables.upload_parts


def check_quota(connection: Connection, project_id: str, most: int, more: int) -> None:
    """Raises :class:`StorageQuotaError` where ``more`` bytes are too many for a project that may keep ``most``."""
    used = _used(connection, project_id)
    if used + more > most:
        raise StorageQuotaError(
            f"The project takes {used:,} bytes and may take {most:,}; this needs {more:,} more. Delete files that are "
            "not needed any more, or cancel uploads, which need their size twice until they are complete."
        )


async def write_with_room(
    database: Database,
    folder: FileFolder,
    project_id: str,
    work: Callable[[Connection], Result],
    *,
    durable: bool = False,
) -> Result:
    """:meth:`Database.write` of what checks the quota, with the project's expired uploads out of its way."""
    try:
        return await database.write(work, durable=durable)
    except StorageQuotaError:
        if not await release_expired(database, folder, project_id=project_id):
            raise
    return await database.write(work, durable=durable)


async def release_expired(
    database: Database, folder: FileFolder, *, project_id: str | None = None, abandoned_s: float = ABANDONED_S
) -> int:
    """Remove the parts of uploads that expired, of one project or all, and count them no more; how many these were.

    Raises :class:`StoreError`.
    """
    now = now_us()
    # One that was being completed when it expired may still be; whoever was at it for hours longer was killed.
    over = or_(
        and_(_UPLOADS.c.status == "pending", _UPLOADS.c.expires_at <= now),
        and_(_UPLOADS.c.status == "completing", _UPLOADS.c.expires_at <= now - int(abandoned_s * 1_000_000)),
    )
    query = select(_UPLOADS.c.id).where(over)
    if project_id is not None:
        query = query.where(_UPLOADS.c.project_id == project_id)
    expired = await database.read(lambda connection: list(connection.execute(query).scalars()))
    released = 0
    for upload_id in expired:
        # Asked again, as it may be being completed by now; parts that a kill leaves here are swept by their age.
        gone = update(_UPLOADS).where(_UPLOADS.c.id == upload_id, over).values(status="expired")
        if await database.write(lambda connection, gone=gone: connection.execute(gone).rowcount):  # type: ignore[misc]
            await asyncio.to_thread(folder.remove_parts, upload_id)
            released += 1
    return released


def _used(connection: Connection, project_id: str) -> int:
    kept = connection.execute(select(func.sum(_FILES.c.bytes)).where(_FILES.c.project_id == project_id)).scalar()
    uploads = connection.execute(
        select(_UPLOADS.c.bytes, _UPLOADS.c.file_id, func.sum(_PARTS.c.bytes).label("parts"))
        .outerjoin(_PARTS, _PARTS.c.upload_id == _UPLOADS.c.id)
        .where(_UPLOADS.c.project_id == project_id, _UPLOADS.c.status.in_(OPEN))
        .group_by(_UPLOADS.c.id)
    )
    coming = [max(row.bytes, int(row.parts or 0)) + (0 if row.file_id else row.bytes) for row in uploads]
    return int(kept or 0) + int(sum(coming))
