"""``/v1/responses``: answers as items, kept on the server, whole, streamed or in the background.

A response that builds on another (or stands in a conversation) is answered with all items that lead to it. Functions
are the only tools: Gale calls none of them by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gale.engine.request import Engine, Finished, TokenScore, Usage
from gale.platform.access import authorize
from gale.platform.errors import ConflictError
from gale.platform.ids import new_id
from gale.platform.responses import UNFINISHED, KeptResponse, Responses
from gale.platform.store import Store
from gale.server.background import Background
from gale.server.caller import actor_of, engine_of
from gale.server.disconnect import while_wanted
from gale.server.errors import ApiError, as_api_error
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle
from gale.server.listing import After, Limit, Order, page_of
from gale.server.openai_chat import answer
from gale.server.openai_logprobs import chat_logprobs
from gale.server.openai_request import Asked, to_engine
from gale.server.responses_items import to_chat, to_items
from gale.server.responses_output import Output
from gale.server.responses_schema import ResponseRequest, renamed, response_object
from gale.server.sse import EventStream, ServerSentEvent, StreamLimits

log = structlog.get_logger("gale.server.responses")


def routes(engine: Engine, store: Store, lifecycle: Lifecycle, limits: StreamLimits) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1/responses", tags=["openai"])
    background = Background(store)
    lifecycle.background.append(background.run)

    @router.post("", response_model=None, openapi_extra=request_schema(ResponseRequest))
    async def create(request: Request) -> Response:
        authorize(actor_of(request), "use")
        body = await read_json(request, ResponseRequest)
        metered = engine_of(request, engine)
        asked, kept = await _asked(metered, store, request, body)
        responses = None if body.store is False else store.responses(actor_of(request))
        answering = _Answering(metered, asked, kept, responses)
        if body.stream:
            return EventStream(
                _stream(answering), lifecycle, error_name="error", error_body=_error_event, limits=limits
            )
        if body.background and responses is not None:
            with background.room():
                await responses.save(kept)
                background.begin(kept.id, answering, actor_of(request))
            return JSONResponse(kept.body)
        await while_wanted(request.receive, lifecycle, answering.to_end(reraise=True))
        return JSONResponse(kept.body)

    @router.post("/input_tokens", openapi_extra=request_schema(ResponseRequest))
    async def count(request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "use")
        body = await read_json(request, ResponseRequest)
        asked, _ = await _asked(engine_of(request, engine), store, request, body)
        tokens = await asyncio.to_thread(engine.count_prompt_tokens, asked.messages, asked.tools)
        return {"object": "response.input_tokens", "input_tokens": tokens}

    @router.get("/{response_id}")
    async def get(response_id: str, request: Request, stream: bool = False) -> dict[str, Any]:
        if stream:
            raise ApiError(400, "A kept response cannot be streamed.", code="unsupported_parameter", param="stream")
        return (await store.responses(actor_of(request)).get(response_id)).body

    @router.delete("/{response_id}")
    async def delete(response_id: str, request: Request) -> dict[str, Any]:
        await store.responses(actor_of(request)).delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @router.post("/{response_id}/cancel")
    async def stop(response_id: str, request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "write")
        responses = store.responses(actor_of(request))
        kept = await responses.get(response_id)
        if not kept.body["background"]:
            raise ApiError(400, "Only a response in the background can be cancelled.", code="invalid_request")
        await background.cancel(response_id)
        kept = await responses.get(response_id)
        if kept.body["status"] in UNFINISHED:
            raise ConflictError("It is being answered by another server, or its server was killed.")
        return kept.body

    @router.get("/{response_id}/input_items")
    async def input_items(
        response_id: str, request: Request, limit: Limit = 20, after: After = None, order: Order = "desc"
    ) -> dict[str, Any]:
        kept = await store.responses(actor_of(request)).get(response_id)
        return page_of(kept.input, limit=limit, after=after, order=order)

    return router


class _Answering:
    """One response while it is being answered; ``kept.body`` is what it has come to."""

    def __init__(self, engine: Engine, asked: Asked, kept: KeptResponse, responses: Responses | None) -> None:
        self._engine = engine
        self._asked = asked
        self._kept = kept
        self._responses = responses
        self._why_cancelled: dict[str, str] | None = None

    def access_ended(self) -> None:
        """See :class:`gale.server.background.Answering`."""
        message = "It was stopped: the key or account that asked for it is no longer valid."
        self._why_cancelled = {"code": "server_error", "message": message}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """What a stream says, without sequence numbers.

        What the engine refuses before its first event is raised; a later failure ends the response as failed.
        """
        body = self._kept.body
        output = Output(self._logprobs if self._asked.each[0].logprobs is not None else None)
        body["output"] = output.items
        answering = answer(self._engine, self._asked, self._asked.each[0])
        begun = False
        try:
            async for event in answering:
                if not begun:
                    begun = True
                    await self._begin()
                    yield {"type": "response.created", "response": {**body, "output": []}}
                    yield {"type": "response.in_progress", "response": {**body, "output": []}}
                if isinstance(event, Finished):
                    for shown in self._finish(event, output):
                        yield shown
                    break
                for shown in output.add(event):
                    yield shown
        except Exception as error:
            failure = as_api_error(error)
            body["status"], body["error"] = "failed", {"code": "server_error", "message": failure.message}
            if not begun:
                raise
            log.error("response failed", exc_info=error)
        finally:
            await answering.aclose()
            if body["status"] in ("queued", "in_progress"):  # the client has left, or cancelled it
                body["status"], body["error"] = "cancelled", self._why_cancelled
            if begun or body["background"]:
                await self._save()
        yield {"type": f"response.{body['status']}", "response": body}

    async def to_end(self, *, reraise: bool = False) -> None:
        """Answer for nobody who listens."""
        events = self.events()
        try:
            async for _ in events:
                pass
        except Exception as error:
            if reraise:
                raise
            log.info("response refused", response_id=self._kept.id, reason=as_api_error(error).message)
        finally:
            await events.aclose()

    async def _begin(self) -> None:
        self._kept.body["status"] = "in_progress"
        if self._kept.body["background"]:
            await self._save()

    def _finish(self, event: Finished, output: Output) -> list[dict[str, Any]]:
        body, whole = self._kept.body, event.reason == "stop"
        shown = list(output.close("completed" if whole else "incomplete"))
        body["status"] = "completed" if whole else "incomplete"
        body["incomplete_details"] = None if whole else {"reason": "max_output_tokens"}
        body["completed_at"] = int(time.time()) if whole else None
        thought = "".join(
            part["text"] for item in output.items if item["type"] == "reasoning" for part in item["content"]
        )
        body["usage"] = usage_object(event.usage, len(self._engine.encode(thought)) if thought else 0)
        return shown

    def _logprobs(self, scores: list[TokenScore]) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = chat_logprobs(self._engine, scores, as_ids=self._asked.as_ids)["content"]
        return entries

    async def _save(self) -> None:
        if self._responses is not None:
            await self._responses.save(self._kept)


def usage_object(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """Token counts as this API names them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


async def _asked(engine: Engine, store: Store, request: Request, body: ResponseRequest) -> tuple[Asked, KeptResponse]:
    """What to ask of the engine, and the response that is to become of it. Raises :class:`ApiError`."""
    body.check()
    given = to_items([] if body.input is None else body.input, "input")
    before: list[dict[str, Any]] = []
    actor = actor_of(request)
    if body.previous_response_id is not None:
        before = await store.responses(actor).history(body.previous_response_id)
    elif body.conversation is not None:
        if body.store is not False:  # the answer will be added to it
            authorize(actor, "write")
        before = await store.item_conversations(actor).items(body.conversation)
    if not given and not before:
        message = "Missing required parameter: 'input'."
        raise ApiError(400, message, code="missing_required_parameter", param="input")
    try:
        asked = await asyncio.to_thread(
            lambda: to_engine(body.chat(to_chat([*before, *given], body.instructions)), engine)
        )
    except ApiError as error:
        raise renamed(error) from error
    asked = replace(asked, grammar_field="text.format" if asked.grammar_field == "response_format" else "tools")
    response_id = new_id("resp")
    shown = response_object(body, response_id, int(time.time()), asked.each[0].adapter or engine.model_id)
    return asked, KeptResponse(response_id, given, shown)


async def _stream(answering: _Answering) -> AsyncGenerator[ServerSentEvent, None]:
    numbers = itertools.count()
    events = answering.events()
    try:
        async for event in events:
            numbered = {**event, "sequence_number": next(numbers)}
            yield ServerSentEvent(to_json(numbered), event["type"])
    finally:
        await events.aclose()


def _error_event(error: ApiError) -> dict[str, Any]:
    told = error.body["error"]
    return {"type": "error", "code": told["code"], "message": told["message"], "param": told["param"]}
