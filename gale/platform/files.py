"""A project's files: rows that name them, bytes in a :class:`FileFolder`.

A row is there before its bytes are and goes after them, in states that nobody is shown, so that a process killed at any
moment leaves no bytes that no row knows of.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Select, delete, insert, or_, select, update

from gale.platform import tables
from gale.platform.access import Actor
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, NotFoundError, PurposeError
from gale.platform.file_folder import ABANDONED_S, Digest, FileFolder, IncomingFile, digest, place
from gale.platform.ids import new_id
from gale.platform.jobs import unfinished
from gale.platform.listing import Listing, Order, page_of
from gale.platform.storage_quota import check_quota, write_with_room
from gale.platform.text import storable

# What people may upload; the server itself also makes what ``batch_output`` and ``fine-tune-results`` name.
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
PURPOSES: tuple[str, ...] = get_args(Purpose)
# OpenAI's: a batch's requests are kept for thirty days unless something else is asked for, all else for ever.
BATCH_LASTS_S = 30 * 24 * 3600

_TABLE = tables.files


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Most bytes of a file sent in one piece, of one sent in parts, of a part, and of all that a project keeps."""

    file_bytes: int = 512 * 1024**2
    upload_bytes: int = 8 * 1024**3
    part_bytes: int = 64 * 1024**2
    project_bytes: int = 64 * 1024**3


@dataclass(frozen=True, slots=True)
class File:
    """A file without its bytes. Times in microseconds since 1970; without ``expires_at`` it is kept for ever."""

    id: str
    project_id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: str
    status_details: str | None
    created_at: int
    expires_at: int | None


class Files:
    """The files of one project. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database, folder: FileFolder, limits: FileLimits, actor: Actor) -> None:
        self._database = database
        self._project = actor.project
        self.folder = folder
        self.limits = limits

    async def keep(
        self,
        incoming: IncomingFile,
        *,
        filename: str,
        purpose: str,
        lasts_s: int | None = None,
        upload_id: str | None = None,
    ) -> File:
        """Make what was written a file, kept for ``lasts_s`` seconds or for ever.

        ``upload_id`` names the upload that it is made of, which has its space already. Raises
        :class:`StorageQuotaError` or :class:`NoSpaceError`, and leaves nothing then.
        """
        written = await asyncio.to_thread(incoming.finish)
        file = self._new(new_id("file"), written, filename, purpose, lasts_s)

        def arrive(connection: Connection) -> None:
            if upload_id is None:
                check_quota(connection, self._project, self.limits.project_bytes, written.size)
            else:
                uploads = tables.uploads
                connection.execute(update(uploads).where(uploads.c.id == upload_id).values(file_id=file.id))
            connection.execute(insert(_TABLE).values(_values(file)))

        await write_with_room(self._database, self.folder, self._project, arrive, durable=True)
        try:
            await asyncio.to_thread(incoming.keep, self.folder.path(file.id))
        except Exception:
            await self._database.write(lambda connection: _delete_row(connection, file.id))
            raise
        return await self._arrived(file.id)

    async def adopt(self, path: Path, file_id: str, *, filename: str, purpose: str, lasts_s: int | None = None) -> File:
        """Make a file that the server wrote at ``path`` the file ``file_id``; done again, it changes nothing.

        Raises :class:`NoSpaceError`.
        """
        known = await self._database.read(
            lambda connection: connection.execute(select(_TABLE).where(_TABLE.c.id == file_id)).one_or_none()
        )
        if known is None:
            place_of_it = self.folder.path(file_id)
            there = path if await asyncio.to_thread(path.exists) else place_of_it
            file = self._new(file_id, await asyncio.to_thread(digest, there), filename, purpose, lasts_s)
            await self._database.write(lambda connection: connection.execute(insert(_TABLE).values(_values(file))))
        elif known.status != "arriving":
            return _file(known)
        if await asyncio.to_thread(path.exists):
            await asyncio.to_thread(place, path, self.folder.path(file_id))
        return await self._arrived(file_id)

    async def get(self, file_id: str) -> File:
        """Raises :class:`NotFoundError`."""
        return await self._database.read(lambda connection: self._get(connection, file_id))

    async def page(
        self, *, limit: int, purpose: str | None = None, after: str | None = None, order: Order = "desc"
    ) -> Listing[File]:
        """Files, the newest first. Raises :class:`CursorError`."""
        query = self._there()
        if purpose is not None:
            query = query.where(_TABLE.c.purpose == storable(purpose))

        def work(connection: Connection) -> Listing[File]:
            page = page_of(connection, query, _TABLE, limit=limit, after=after, order=order)
            return Listing([_file(row) for row in page.items], page.has_more)

        return await self._database.read(work)

    async def delete(self, file_id: str) -> None:
        """Raises :class:`NotFoundError`, and :class:`ConflictError` while a job needs the file."""

        def leave(connection: Connection) -> None:
            file = self._get(connection, file_id)
            for job in unfinished(connection, self._project):
                if file.id in job.payload.values():
                    raise ConflictError(f"The job {job.id} still needs this file.")
            connection.execute(update(_TABLE).where(_TABLE.c.id == file.id).values(status="leaving"))

        await self._database.write(leave)
        await asyncio.to_thread(self.folder.remove, file_id)
        await self._database.write(lambda connection: _delete_row(connection, file_id))

    def require(self, connection: Connection, file_id: str, purpose: str) -> File:
        """For a job about to be created: its file, which from then on cannot be deleted.

        Raises as :meth:`get` does, and :class:`PurposeError`.
        """
        file = self._get(connection, file_id, lock=True)
        if file.purpose != purpose:
            raise PurposeError(f"The file {file.id} has the purpose '{file.purpose}', and this needs '{purpose}'.")
        return file

    def _new(self, file_id: str, written: Digest, filename: str, purpose: str, lasts_s: int | None) -> File:
        now = now_us()
        expires_at = None if lasts_s is None else now + lasts_s * 1_000_000
        name = storable(filename)
        return File(
            file_id, self._project, name, purpose, written.size, written.sha256, "arriving", None, now, expires_at
        )

    async def _arrived(self, file_id: str) -> File:
        def work(connection: Connection) -> File:
            row = connection.execute(
                update(_TABLE).where(_TABLE.c.id == file_id).values(status="processed").returning(_TABLE)
            ).one()
            return _file(row)

        return await self._database.write(work, durable=True)

    def _there(self) -> Select[Any]:
        alive = or_(_TABLE.c.expires_at.is_(None), _TABLE.c.expires_at > now_us())
        return select(_TABLE).where(_TABLE.c.project_id == self._project, _TABLE.c.status == "processed", alive)

    def _get(self, connection: Connection, file_id: str, *, lock: bool = False) -> File:
        query = self._there().where(_TABLE.c.id == storable(file_id))
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise NotFoundError(f"There is no file '{file_id[:100]}'.")
        return _file(row)


async def sweep(database: Database, folder: FileFolder, abandoned_s: float = ABANDONED_S) -> None:
    """Remove files whose time is over, and what processes left that were killed while files came or went.

    A file that a job still needs stays until the job ends.
    """
    await asyncio.to_thread(folder.sweep, abandoned_s)
    now = now_us()
    before = now - int(abandoned_s * 1_000_000)

    def leave(connection: Connection) -> list[str]:
        over = or_(
            _TABLE.c.expires_at <= now, (_TABLE.c.status.in_(("arriving", "leaving"))) & (_TABLE.c.created_at <= before)
        )
        found = [_file(row) for row in connection.execute(select(_TABLE).where(over))]
        needed: set[str] = set()
        for project_id in {file.project_id for file in found}:
            for job in unfinished(connection, project_id):
                # Also what it is about to bring: its answers arrive under ids that it chose before.
                needed |= {value for value in (*job.payload.values(), *job.result.values()) if isinstance(value, str)}
        leaving = [file.id for file in found if file.id not in needed]
        for file_id in leaving:
            connection.execute(update(_TABLE).where(_TABLE.c.id == file_id).values(status="leaving"))
        return leaving

    for file_id in await database.write(leave):
        await asyncio.to_thread(folder.remove, file_id)
        await database.write(lambda connection, file_id=file_id: _delete_row(connection, file_id))  # type: ignore[misc]


def _delete_row(connection: Connection, file_id: str) -> None:
    connection.execute(delete(_TABLE).where(_TABLE.c.id == file_id))


def _file(row: Any) -> File:
    return File(*tuple(row))


def _values(file: File) -> dict[str, Any]:
    return {column.name: getattr(file, column.name) for column in _TABLE.columns}
