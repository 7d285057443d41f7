"""The chat page's API: the model on offer and the conversations, without their turns."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from gale import __version__
from gale.engine.request import Engine
from gale.platform.access import authorize
from gale.platform.conversations import Conversations
from gale.platform.store import Store
from gale.server.caller import actor_of, is_signed_in
from gale.server.json_body import read_json, request_schema
from gale.server.page_schema import ConversationChange, NewConversation, conversation_json, message_json


def routes(engine: Engine, store: Store) -> APIRouter:
    """``/api/info`` and ``/api/conversations``."""
    router = APIRouter(prefix="/api", tags=["chat page"])

    def conversations(request: Request) -> Conversations:
        return store.conversations(actor_of(request))

    @router.get("/info")
    async def info(request: Request) -> dict[str, Any]:
        model = {"id": engine.model_id, "context_length": engine.context_length}
        return {"name": "Gale", "version": __version__, "model": model, "signed_in": is_signed_in(request)}

    @router.get("/conversations")
    async def page(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        cursor: Annotated[str | None, Query(max_length=200)] = None,
    ) -> dict[str, Any]:
        found = await conversations(request).page(limit, cursor or None)
        return {
            "conversations": [conversation_json(each) for each in found.conversations],
            "next_cursor": found.next_cursor,
        }

    @router.post("/conversations", status_code=201, openapi_extra=request_schema(NewConversation))
    async def create(request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "write")
        await read_json(request, NewConversation)
        return conversation_json(await conversations(request).create())

    @router.get("/conversations/{conversation_id}")
    async def get(conversation_id: str, request: Request) -> dict[str, Any]:
        conversation, messages = await conversations(request).get(conversation_id)
        return {**conversation_json(conversation), "messages": [message_json(message) for message in messages]}

    @router.patch("/conversations/{conversation_id}", openapi_extra=request_schema(ConversationChange))
    async def change(conversation_id: str, request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "write")
        body = await read_json(request, ConversationChange)
        return conversation_json(
            await conversations(request).change(conversation_id, title=body.title, leaf_id=body.leaf_id)
        )

    @router.delete("/conversations/{conversation_id}", status_code=204)
    async def delete(conversation_id: str, request: Request) -> Response:
        authorize(actor_of(request), "write")
        await conversations(request).delete(conversation_id)
        return Response(status_code=204)

    return router
