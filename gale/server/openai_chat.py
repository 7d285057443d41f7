"""``POST /v1/chat/completions``, whole or streamed, as OpenAI's clients expect it."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gale.engine.request import Engine, EngineFailedError, Finished, SamplingParams, TextDelta, Usage
from gale.server.disconnect import while_wanted
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle
from gale.server.openai_request import to_engine
from gale.server.openai_schema import ChatRequest
from gale.server.sse import EventStream, ServerSentEvent, StreamLimits
from gale.text.template import Message


def routes(engine: Engine, lifecycle: Lifecycle, limits: StreamLimits) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/chat/completions", response_model=None, openapi_extra=request_schema(ChatRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, ChatRequest)
        messages, sampling = to_engine(body, engine)
        if body.stream:
            chunks = _stream(engine, messages, sampling, include_usage=body.include_usage)
            return EventStream(chunks, lifecycle, limits=limits)
        work = _whole(engine, messages, sampling)
        return JSONResponse(await while_wanted(request.receive, lifecycle, work))

    return router


async def _whole(engine: Engine, messages: list[Message], sampling: SamplingParams) -> dict[str, Any]:
    head = _head(engine, sampling, "chat.completion")
    text: list[str] = []
    events = engine.chat(messages, sampling)
    try:
        async for event in events:
            if isinstance(event, TextDelta):
                text.append(event.text)
                continue
            message = {"role": "assistant", "content": "".join(text), "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(event)}
            return {**head, "choices": [choice], "usage": usage_object(event.usage)}
    finally:
        await events.aclose()
    raise EngineFailedError("The model's answer ended without an end.")


async def _stream(
    engine: Engine, messages: list[Message], sampling: SamplingParams, *, include_usage: bool
) -> AsyncGenerator[ServerSentEvent, None]:
    """Chunks in the order that OpenAI's clients rely on.

    First the role alone, then text, then an empty delta with the reason, then (if asked for) the usage without
    choices, then ``[DONE]``. ``id``, ``created`` and ``model`` are the same in all.
    """
    head = _head(engine, sampling, "chat.completion.chunk")
    if include_usage:
        head["usage"] = None

    def chunk(delta: dict[str, str], reason: str | None = None) -> ServerSentEvent:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return ServerSentEvent(to_json({**head, "choices": [choice]}))

    events = engine.chat(messages, sampling)
    begun = False
    try:
        async for event in events:
            if not begun:
                # Only now: what the engine refuses before its first event is still an ordinary HTTP error.
                yield chunk({"role": "assistant", "content": ""})
                begun = True
            if isinstance(event, TextDelta):
                if event.text:
                    yield chunk({"content": event.text})
                continue
            yield chunk({}, finish_reason(event))
            if include_usage:
                yield ServerSentEvent(to_json({**head, "choices": [], "usage": usage_object(event.usage)}))
            yield ServerSentEvent("[DONE]")
            return
    finally:
        await events.aclose()
    raise EngineFailedError("The model's answer ended without an end.")


def _head(engine: Engine, sampling: SamplingParams, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": sampling.adapter or engine.model_id,
    }


def finish_reason(finished: Finished) -> str:
    """How an answer ended, in OpenAI's words. Raises :class:`EngineFailedError` where it has none."""
    if finished.reason == "cancelled":
        # OpenAI has no such reason, and "stop" would pass off half an answer as a whole one.
        raise EngineFailedError("The answer was cancelled before its end.")
    return finished.reason


def usage_object(usage: Usage) -> dict[str, int]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
