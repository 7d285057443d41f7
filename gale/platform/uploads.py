"""Files sent in parts, for what is too large or too slow for one request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from gale.core.errors import GaleError
from gale.platform import tables
from gale.platform.access import Actor
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, FileTooLargeError, NotFoundError
from gale.platform.file_folder import Digest, FileFolder, IncomingFile
from gale.platform.files import File, FileLimits, Files
from gale.platform.ids import new_id
from gale.platform.storage_quota import OPEN, check_quota, write_with_room
from gale.platform.text import storable

LASTS_S = 3600
MOST_PARTS = 10_000
_PIECE = 1024 * 1024
_TABLE, _PARTS = tables.uploads, tables.upload_parts


class UploadError(GaleError):
    """Parts that are not what the upload said; ``param`` is the field at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload without its parts. Times in microseconds since 1970; ``bytes`` is how many there shall be."""

    id: str
    project_id: str
    filename: str
    purpose: str
    mime_type: str
    bytes: int
    status: str
    file_id: str | None
    file_lasts_s: int | None
    created_at: int
    expires_at: int

    @property
    def shown_status(self) -> str:
        """In OpenAI's words."""
        if self.status not in OPEN:
            return self.status
        return "expired" if self.expires_at <= now_us() else "pending"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload."""

    id: str
    upload_id: str
    bytes: int
    position: int
    created_at: int


class Uploads:
    """The uploads of one project. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database, folder: FileFolder, limits: FileLimits, actor: Actor) -> None:
        self._database = database
        self._folder = folder
        self._limits = limits
        self._project = actor.project
        self._files = Files(database, folder, limits, actor)

    async def create(
        self, *, filename: str, purpose: str, size: int, mime_type: str, file_lasts_s: int | None
    ) -> Upload:
        """Begin one of ``size`` bytes, for which twice the space is set aside. Raises :class:`StorageQuotaError`."""
        if size > self._limits.upload_bytes:
            raise FileTooLargeError(f"An upload may have at most {self._limits.upload_bytes:,} bytes.")
        now = now_us()
        upload = Upload(
            new_id("upload"),
            self._project,
            storable(filename),
            purpose,
            storable(mime_type),
            size,
            "pending",
            None,
            file_lasts_s,
            now,
            now + LASTS_S * 1_000_000,
        )

        def work(connection: Connection) -> None:
            check_quota(connection, self._project, self._limits.project_bytes, 2 * size)
            connection.execute(insert(_TABLE).values(asdict(upload)))

        await write_with_room(self._database, self._folder, self._project, work)
        return upload

    async def check(self, upload_id: str) -> Upload:
        """The upload, if it takes parts. Raises :class:`NotFoundError` or :class:`ConflictError`."""
        return await self._database.read(lambda connection: self._pending(connection, upload_id))

    def incoming_part(self) -> IncomingFile:
        """Where a part is written before :meth:`add_part` keeps it."""
        return self._folder.incoming(self._limits.part_bytes)

    async def add_part(self, upload_id: str, incoming: IncomingFile) -> Part:
        """Keep what was written as a part.

        Raises as :meth:`check` does, :class:`UploadError`, :class:`StorageQuotaError` and :class:`NoSpaceError`.

        Parts may together hold twice what the upload said, so that one can be sent again; only those that are named
        at the end become the file.
        """
        written = await asyncio.to_thread(incoming.finish)
        part_id, now = new_id("part"), now_us()
        path = self._folder.part_path(upload_id, part_id)

        def work(connection: Connection) -> Part:
            upload = self._pending(connection, upload_id, lock=True)
            count, held = connection.execute(
                select(func.count(), func.sum(_PARTS.c.bytes)).where(_PARTS.c.upload_id == upload.id)
            ).one()
            held = int(held or 0)
            if count >= MOST_PARTS or held + written.size > 2 * upload.bytes:
                raise UploadError(f"The upload was to have {upload.bytes:,} bytes; this is far more.", "data")
            if (more := held + written.size - max(held, upload.bytes)) > 0:
                check_quota(connection, self._project, self._limits.project_bytes, more)
            part = Part(part_id, upload.id, written.size, count, now)
            connection.execute(insert(_PARTS).values(asdict(part)))
            return part

        # The bytes first: a row without them would be worse than bytes that are swept away with their upload.
        await asyncio.to_thread(incoming.keep, path)
        try:
            return await write_with_room(self._database, self._folder, self._project, work)
        except Exception:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    async def complete(self, upload_id: str, part_ids: Sequence[str], md5: str | None) -> tuple[Upload, File]:
        """Make a file of the parts in the order given.

        Raises as :meth:`check` does, :class:`UploadError` for parts that are not what was announced, and as
        :meth:`Files.keep` does; the upload can be completed another time then.
        """

        def begin(connection: Connection) -> tuple[Upload, list[Path]]:
            upload = self._pending(connection, upload_id, lock=True)
            rows = connection.execute(select(_PARTS).where(_PARTS.c.upload_id == upload.id))
            parts = {row.id: Part(*tuple(row)) for row in rows}
            for place, part_id in enumerate(part_ids):
                if part_id not in parts:
                    raise UploadError("The upload has no such part.", f"part_ids[{place}]")
            if len(set(part_ids)) != len(part_ids):
                raise UploadError("A part is named twice.", "part_ids")
            total = sum(parts[part_id].bytes for part_id in part_ids)
            if total != upload.bytes:
                raise UploadError(f"The parts have {total:,} bytes; {upload.bytes:,} were announced.", "part_ids")
            _move(connection, upload.id, "completing")
            return upload, [self._folder.part_path(upload.id, part_id) for part_id in part_ids]

        upload, paths = await self._database.write(begin)
        try:
            with self._folder.incoming(self._limits.upload_bytes) as incoming:
                written = await asyncio.to_thread(_join, paths, incoming)
                if md5 is not None and written.md5 != md5.lower():
                    raise UploadError("The file's MD5 is another one.", "md5")
                file = await self._files.keep(
                    incoming,
                    filename=upload.filename,
                    purpose=upload.purpose,
                    lasts_s=upload.file_lasts_s,
                    upload_id=upload.id,
                )
        except Exception:
            await self._database.write(lambda connection: _move(connection, upload.id, "pending"))
            raise
        # In this order, as parts count for as long as they are there.
        await asyncio.to_thread(self._folder.remove_parts, upload.id)
        await self._database.write(lambda connection: _move(connection, upload.id, "completed", file.id))
        return replace(upload, status="completed", file_id=file.id), file

    async def cancel(self, upload_id: str) -> Upload:
        """Forget the parts. Raises as :meth:`check` does."""

        def work(connection: Connection) -> Upload:
            upload = self._pending(connection, upload_id, lock=True)
            _move(connection, upload.id, "cancelled")
            return replace(upload, status="cancelled")

        upload = await self._database.write(work)
        await asyncio.to_thread(self._folder.remove_parts, upload.id)
        return upload

    def _pending(self, connection: Connection, upload_id: str, *, lock: bool = False) -> Upload:
        query = select(_TABLE).where(_TABLE.c.id == storable(upload_id), _TABLE.c.project_id == self._project)
        row: Any = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise NotFoundError(f"There is no upload '{upload_id[:100]}'.")
        upload = Upload(*tuple(row))
        if upload.shown_status != "pending" or upload.status == "completing":
            state = "being completed" if upload.shown_status == "pending" else upload.shown_status
            raise ConflictError(f"The upload {upload.id} is {state}.")
        return upload


def _join(paths: list[Path], incoming: IncomingFile) -> Digest:
    for path in paths:
        with path.open("rb") as part:
            while piece := part.read(_PIECE):
                incoming.write(piece)
    return incoming.finish()


def _move(connection: Connection, upload_id: str, status: str, file_id: str | None = None) -> None:
    connection.execute(update(_TABLE).where(_TABLE.c.id == upload_id).values(status=status, file_id=file_id))
