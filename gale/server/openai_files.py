"""``/v1/files``: what people upload and what jobs make, whole; ``openai_uploads`` takes them in parts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from gale.platform.access import authorize
from gale.platform.errors import NotFoundError
from gale.platform.files import BATCH_LASTS_S, PURPOSES, File, Files
from gale.platform.store import Store
from gale.server.caller import actor_of
from gale.server.errors import ApiError, invalid
from gale.server.field_checks import Body
from gale.server.file_answer import FileAnswer, open_file
from gale.server.listing import After, Order, listed
from gale.server.multipart import read_form

LEAST_LASTS_S, MOST_LASTS_S = 3600, 30 * 24 * 3600
_NUMBER = re.compile(r"[0-9]{1,9}")


class ExpiresAfter(Body):
    """When a file is to go."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_LASTS_S, le=MOST_LASTS_S)]


def routes(store: Store) -> APIRouter:
    """The five routes."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    def files(request: Request) -> Files:
        authorize(actor_of(request), "read")
        return store.files(actor_of(request))

    @router.post("", response_model=None, openapi_extra=_form_schema())
    async def create(request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "write")
        mine = files(request)
        with mine.folder.incoming(mine.limits.file_bytes) as incoming:
            form = await read_form(request, "file", incoming)
            purpose = purpose_of(form.fields.get("purpose"))
            lasts_s = _lasts_s(form.fields)
            file = await mine.keep(
                incoming, filename=form.filename, purpose=purpose, lasts_s=default_lasts_s(purpose, lasts_s)
            )
        return file_object(file)

    @router.get("")
    async def page(
        request: Request,
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: After = None,
        order: Order = "desc",
    ) -> dict[str, Any]:
        found = await files(request).page(limit=limit, purpose=purpose, after=after, order=order)
        return listed([file_object(file) for file in found.items], has_more=found.has_more)

    @router.get("/{file_id}")
    async def get(file_id: str, request: Request) -> dict[str, Any]:
        return file_object(await files(request).get(file_id))

    @router.get("/{file_id}/content")
    async def content(file_id: str, request: Request) -> Response:
        mine = files(request)
        file = await mine.get(file_id)
        try:
            opened = await open_file(mine.folder.path(file.id))
        except FileNotFoundError as error:  # deleted since
            raise NotFoundError(f"There is no file '{file.id}'.") from error
        return FileAnswer(opened, file.bytes, file.filename)

    @router.delete("/{file_id}")
    async def delete(file_id: str, request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "write")
        await files(request).delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def file_object(file: File) -> dict[str, Any]:
    """A file as OpenAI shows it."""
    shown = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at // 1_000_000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
    return shown if file.expires_at is None else {**shown, "expires_at": file.expires_at // 1_000_000}


def purpose_of(purpose: str | None) -> str:
    """``purpose`` if it is one that people may give. Raises :class:`ApiError` 400."""
    if purpose is None:
        raise ApiError(
            400, "Missing required parameter: 'purpose'.", code="missing_required_parameter", param="purpose"
        )
    if purpose not in PURPOSES:
        raise invalid("purpose", f"it must be one of {', '.join(PURPOSES)}")
    return purpose


def default_lasts_s(purpose: str, lasts_s: int | None) -> int | None:
    """How long a file is kept for which nothing was said."""
    return BATCH_LASTS_S if lasts_s is None and purpose == "batch" else lasts_s


def _lasts_s(fields: dict[str, str]) -> int | None:
    """``expires_after`` as forms write it: a field for each of its keys."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        if "expires_after" in fields:
            raise invalid("expires_after", "in a form, write expires_after[anchor] and expires_after[seconds]")
        return None
    if anchor != "created_at":
        raise invalid("expires_after.anchor", "it must be 'created_at'")
    lasts_s = int(seconds) if seconds is not None and _NUMBER.fullmatch(seconds) else 0
    if not LEAST_LASTS_S <= lasts_s <= MOST_LASTS_S:
        raise invalid("expires_after.seconds", f"it must be a number from {LEAST_LASTS_S} to {MOST_LASTS_S}")
    return lasts_s


def _form_schema() -> dict[str, Any]:
    properties = {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": LEAST_LASTS_S, "maximum": MOST_LASTS_S},
    }
    schema = {"type": "object", "properties": properties, "required": ["file", "purpose"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
