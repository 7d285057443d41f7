"""``/v1/conversations``: items kept together, which responses read and add to."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from gale.platform.errors import NotFoundError
from gale.platform.responses import ItemConversation, ItemConversations
from gale.platform.store import Store
from gale.server.caller import actor_of
from gale.server.errors import ApiError, invalid
from gale.server.field_checks import at_most
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, Limit, Order, listed, page_of
from gale.server.openai_schema import MOST_METADATA
from gale.server.responses_items import to_items

MOST_ADDED = 20  # OpenAI's


class NewConversation(BaseModel):
    """What a conversation begins with."""

    model_config = ConfigDict(strict=True, extra="forbid")

    items: Any = None
    metadata: Annotated[dict[str, str] | None, at_most(MOST_METADATA)] = None


class ConversationChange(BaseModel):
    """The new metadata."""

    model_config = ConfigDict(strict=True, extra="forbid")

    metadata: Annotated[dict[str, str], at_most(MOST_METADATA)]


class NewItems(BaseModel):
    """What is added."""

    model_config = ConfigDict(strict=True, extra="forbid")

    items: Any


def routes(store: Store) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1/conversations", tags=["openai"])

    def conversations(request: Request) -> ItemConversations:
        return store.item_conversations(actor_of(request))

    @router.post("", openapi_extra=request_schema(NewConversation))
    async def create(request: Request) -> dict[str, Any]:
        body = await read_json(request, NewConversation)
        return _shown(await conversations(request).create(body.metadata or {}, _items(body.items or [])))

    @router.get("/{conversation_id}")
    async def get(conversation_id: str, request: Request) -> dict[str, Any]:
        return _shown(await conversations(request).get(conversation_id))

    @router.post("/{conversation_id}", openapi_extra=request_schema(ConversationChange))
    async def change(conversation_id: str, request: Request) -> dict[str, Any]:
        body = await read_json(request, ConversationChange)
        return _shown(await conversations(request).change(conversation_id, body.metadata))

    @router.delete("/{conversation_id}")
    async def delete(conversation_id: str, request: Request) -> dict[str, Any]:
        await conversations(request).delete(conversation_id)
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    @router.post("/{conversation_id}/items", openapi_extra=request_schema(NewItems))
    async def add(conversation_id: str, request: Request) -> dict[str, Any]:
        items = _items((await read_json(request, NewItems)).items)
        await conversations(request).add(conversation_id, items)
        return listed(items, has_more=False)

    @router.get("/{conversation_id}/items")
    async def items(
        conversation_id: str, request: Request, limit: Limit = 20, after: After = None, order: Order = "desc"
    ) -> dict[str, Any]:
        return page_of(await conversations(request).items(conversation_id), limit=limit, after=after, order=order)

    @router.get("/{conversation_id}/items/{item_id}")
    async def item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
        for each in await conversations(request).items(conversation_id):
            if each["id"] == item_id:
                return each
        raise NotFoundError("There is no such item in this conversation.")

    @router.delete("/{conversation_id}/items/{item_id}")
    async def delete_item(conversation_id: str, item_id: str, request: Request) -> dict[str, Any]:
        return _shown(await conversations(request).delete_item(conversation_id, item_id))

    return router


def _items(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        raise ApiError(400, "Invalid 'items': it must be an array.", code="invalid_type", param="items")
    if len(given) > MOST_ADDED:
        raise invalid("items", f"at most {MOST_ADDED} items can be added at a time")
    return to_items(given, "items")


def _shown(conversation: ItemConversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_at // 1_000_000,
        "metadata": conversation.metadata,
    }
