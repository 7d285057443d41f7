"""``/v1/uploads``: one file in parts, which become a file when all have come."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gale.platform.access import authorize
from gale.platform.files import File
from gale.platform.store import Store
from gale.platform.uploads import MOST_PARTS, Upload, UploadError, Uploads
from gale.server.caller import actor_of
from gale.server.errors import ApiError
from gale.server.field_checks import INT64, at_most
from gale.server.json_body import read_json, request_schema
from gale.server.multipart import MOST_NAME_CHARACTERS, read_form
from gale.server.openai_files import ExpiresAfter, default_lasts_s, file_object, purpose_of


class NewUpload(BaseModel):
    """What is going to come."""

    model_config = ConfigDict(strict=True, extra="ignore")

    filename: Annotated[str, Field(min_length=1, max_length=MOST_NAME_CHARACTERS)]
    purpose: str
    bytes: Annotated[int, Field(ge=1, lt=INT64)]
    mime_type: Annotated[str, Field(min_length=1, max_length=255)]
    expires_after: ExpiresAfter | None = None


class CompletedUpload(BaseModel):
    """In which order the parts belong; with the file's MD5, if it is to be checked."""

    model_config = ConfigDict(strict=True, extra="ignore")

    part_ids: Annotated[list[str], Field(min_length=1), at_most(MOST_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


def routes(store: Store) -> APIRouter:
    """The four routes."""
    router = APIRouter(prefix="/v1/uploads", tags=["files"])

    def uploads(request: Request) -> Uploads:
        authorize(actor_of(request), "write")
        return store.uploads(actor_of(request))

    @router.post("", openapi_extra=request_schema(NewUpload))
    async def create(request: Request) -> dict[str, Any]:
        body = await read_json(request, NewUpload)
        purpose = purpose_of(body.purpose)
        lasts_s = body.expires_after.seconds if body.expires_after else None
        upload = await uploads(request).create(
            filename=body.filename,
            purpose=purpose,
            size=body.bytes,
            mime_type=body.mime_type,
            file_lasts_s=default_lasts_s(purpose, lasts_s),
        )
        return _upload_object(upload)

    @router.post("/{upload_id}/parts", openapi_extra=_part_schema())
    async def add_part(upload_id: str, request: Request) -> dict[str, Any]:
        mine = uploads(request)
        await mine.check(upload_id)
        with mine.incoming_part() as incoming:
            await read_form(request, "data", incoming)
            part = await _explained(mine.add_part(upload_id, incoming))
        return {
            "id": part.id,
            "object": "upload.part",
            "created_at": part.created_at // 1_000_000,
            "upload_id": part.upload_id,
        }

    @router.post("/{upload_id}/complete", openapi_extra=request_schema(CompletedUpload))
    async def complete(upload_id: str, request: Request) -> dict[str, Any]:
        body = await read_json(request, CompletedUpload)
        return _upload_object(*await _explained(uploads(request).complete(upload_id, body.part_ids, body.md5)))

    @router.post("/{upload_id}/cancel")
    async def cancel(upload_id: str, request: Request) -> dict[str, Any]:
        return _upload_object(await uploads(request).cancel(upload_id))

    return router


async def _explained(work: Any) -> Any:
    try:
        return await work
    except UploadError as error:
        raise ApiError(400, error.message, code="invalid_value", param=error.param) from error


def _upload_object(upload: Upload, file: File | None = None) -> dict[str, Any]:
    shown = {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at // 1_000_000,
        "expires_at": upload.expires_at // 1_000_000,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.shown_status,
    }
    return shown if file is None else {**shown, "file": file_object(file)}


def _part_schema() -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"data": {"type": "string", "format": "binary"}},
        "required": ["data"],
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
