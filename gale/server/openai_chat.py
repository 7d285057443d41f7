"""``POST /v1/chat/completions``, whole or streamed, as OpenAI's clients expect it."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gale.engine.request import Engine, EngineFailedError, Event, Finished, SamplingParams, TokenScore, Usage
from gale.server.choices import merged
from gale.server.disconnect import while_wanted
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle
from gale.server.openai_logprobs import chat_logprobs
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
        messages, each = to_engine(body, engine)
        if body.stream:
            chunks = _stream(engine, messages, each, include_usage=body.include_usage)
            return EventStream(chunks, lifecycle, limits=limits)
        work = _whole(engine, messages, each)
        return JSONResponse(await while_wanted(request.receive, lifecycle, work))

    return router


async def _whole(engine: Engine, messages: list[Message], each: list[SamplingParams]) -> dict[str, Any]:
    head = _head(engine, "chat.completion")
    texts: list[list[str]] = [[] for _ in each]
    scores: list[list[TokenScore]] = [[] for _ in each]
    ends: dict[int, Finished] = {}
    events = _answers(engine, messages, each)
    try:
        async for index, event in events:
            if isinstance(event, Finished):
                ends[index] = event
                continue
            texts[index].append(event.text)
            if event.score is not None:
                scores[index].append(event.score)
    finally:
        await events.aclose()
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(text), "refusal": None},
            "logprobs": _logprobs(engine, params, scores[index]),
            "finish_reason": finish_reason(ends[index]),
        }
        for index, (text, params) in enumerate(zip(texts, each, strict=True))
    ]
    return {**head, "choices": choices, "usage": _usage(ends)}


async def _stream(
    engine: Engine, messages: list[Message], each: list[SamplingParams], *, include_usage: bool
) -> AsyncGenerator[ServerSentEvent, None]:
    """Chunks in the order that OpenAI's clients rely on.

    First the role alone for each choice in order, then text, then an empty delta with the reason, then (if asked for)
    the usage without choices, then ``[DONE]``. ``id``, ``created`` and ``model`` are the same in all.
    """
    head = _head(engine, "chat.completion.chunk")
    if include_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None) -> ServerSentEvent:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return ServerSentEvent(to_json({**head, "choices": [choice]}))

    ends: dict[int, Finished] = {}
    events = _answers(engine, messages, each)
    begun = False
    try:
        async for index, event in events:
            if not begun:
                # Only now: what the engine refuses before its first event is still an ordinary HTTP error.
                for place in range(len(each)):
                    yield chunk(place, {"role": "assistant", "content": ""})
                begun = True
            if isinstance(event, Finished):
                ends[index] = event
                yield chunk(index, {}, finish_reason(event))
            elif event.text or event.score is not None:
                shown = [] if event.score is None else [event.score]
                yield chunk(index, {"content": event.text}, logprobs=_logprobs(engine, each[index], shown))
    finally:
        await events.aclose()
    if include_usage:
        yield ServerSentEvent(to_json({**head, "choices": [], "usage": _usage(ends)}))
    yield ServerSentEvent("[DONE]")


def _answers(
    engine: Engine, messages: list[Message], each: list[SamplingParams]
) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all choices. The engine reads the prompt that they share once, where it can."""
    return merged(_answer(engine, messages, sampling) for sampling in each)


async def _answer(engine: Engine, messages: list[Message], sampling: SamplingParams) -> AsyncGenerator[Event, None]:
    events = engine.chat(messages, sampling)
    try:
        async for event in events:
            yield event
            if isinstance(event, Finished):
                return
    finally:
        await events.aclose()
    raise EngineFailedError("The model's answer ended without an end.")


def _logprobs(engine: Engine, sampling: SamplingParams, scores: list[TokenScore]) -> dict[str, Any] | None:
    return None if sampling.logprobs is None else chat_logprobs(engine, scores)


def _head(engine: Engine, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": engine.model_id,
    }


def finish_reason(finished: Finished) -> str:
    """How an answer ended, in OpenAI's words. Raises :class:`EngineFailedError` where it has none."""
    if finished.reason == "cancelled":
        # OpenAI has no such reason, and "stop" would pass off half an answer as a whole one.
        raise EngineFailedError("The answer was cancelled before its end.")
    return finished.reason


def _usage(ends: dict[int, Finished]) -> dict[str, int]:
    """Counts of all choices; the prompt that they share counts once."""
    counts = [ends[index].usage for index in sorted(ends)]
    return usage_object(Usage(counts[0].prompt_tokens, sum(usage.completion_tokens for usage in counts)))


def usage_object(usage: Usage) -> dict[str, int]:
    """Token counts as OpenAI names them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
