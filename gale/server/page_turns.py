"""``POST /api/conversations/{id}/turns``: a question, or the same one again, answered as a stream of events.

The question is stored before the model begins and the answer however it ends: whole, cut by its length, failed,
or stopped by a person who hung up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import structlog
from fastapi import APIRouter, Request

from gale.assistant.turn import answer, fit
from gale.engine.request import Engine, EngineFailedError, Finished, TextDelta
from gale.platform.access import authorize
from gale.platform.conversations import Conversations, Status, StoredMessage, Turn
from gale.platform.store import Store
from gale.server.caller import actor_of, engine_of
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle
from gale.server.page_schema import NewTurn, conversation_json, message_json
from gale.server.sse import EventStream, ServerSentEvent, StreamLimits
from gale.text.template import Message

log = structlog.get_logger("gale.server.turns")

_STATUS: dict[str, Status] = {"stop": "complete", "length": "length", "cancelled": "stopped"}


def routes(engine: Engine, store: Store, lifecycle: Lifecycle, limits: StreamLimits) -> APIRouter:
    """The one route."""
    router = APIRouter(prefix="/api", tags=["chat page"])

    @router.post("/conversations/{conversation_id}/turns", response_model=None, openapi_extra=request_schema(NewTurn))
    async def create(conversation_id: str, request: Request) -> EventStream:
        body = await read_json(request, NewTurn)
        authorize(actor_of(request), "use")
        conversations = store.conversations(actor_of(request))
        if body.regenerate is not None:
            turn = await conversations.ask_again(conversation_id, body.regenerate, model=engine.model_id)
        else:
            parent_id = body.parent_id
            if body.after_leaf:
                conversation, _ = await conversations.get(conversation_id)
                parent_id = conversation.leaf_id
            # Before it is stored: a question that can never be answered is given back to the person who typed it.
            question = Message(role="user", content=body.content or "")
            await asyncio.to_thread(fit, engine, [question])
            turn = await conversations.ask(
                conversation_id, body.content or "", model=engine.model_id, parent_id=parent_id
            )
        return EventStream(
            _events(engine_of(request, engine), conversations, turn), lifecycle, error_name="error", limits=limits
        )

    return router


async def _events(engine: Engine, conversations: Conversations, turn: Turn) -> AsyncGenerator[ServerSentEvent, None]:
    if turn.question is not None:
        yield _event("user_message", message=message_json(turn.question))
    yield _event("assistant_start", message=message_json(turn.answer, "streaming"))
    text: list[str] = []
    # Stands unless something better is known: the client may leave at any yield or await below.
    status: Status = "stopped"
    finished: Finished | None = None
    failure: Exception | None = None
    events = answer(engine, [_as_prompt(message) for message in turn.path])
    try:
        async for event in events:
            if isinstance(event, Finished):
                finished, status = event, _STATUS[event.reason]
            elif isinstance(event, TextDelta) and event.text:
                text.append(event.text)
                yield _event("delta", text=event.text)
        if finished is None:
            raise EngineFailedError("The model's answer ended without an end.")
    except Exception as error:
        status, failure = "error", error
    finally:
        await events.aclose()
        # Finished by the store even if the server, whose own time to stop runs out, cancels us here.
        message, conversation = await conversations.finish(
            turn.answer,
            "".join(text),
            status,
            prompt_tokens=finished.usage.prompt_tokens if finished else None,
            completion_tokens=finished.usage.completion_tokens if finished else None,
        )
        log.info("turn ended", status=status, message_id=message.id)
    if failure is not None:
        raise failure
    yield _event("done", message=message_json(message), conversation=conversation_json(conversation))


def _as_prompt(message: StoredMessage) -> Message:
    return Message(role=message.role, content=message.content)


def _event(name: str, **data: object) -> ServerSentEvent:
    return ServerSentEvent(to_json(data), name)
