"""``POST /v1/chat/completions``, whole or streamed, as OpenAI's clients expect it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gale.engine.request import (
    Engine,
    EngineFailedError,
    Event,
    Finished,
    GrammarError,
    SamplingParams,
    TextDelta,
    TokenScore,
    ToolCallDelta,
    Usage,
)
from gale.server.caller import engine_of
from gale.server.choices import merged
from gale.server.disconnect import while_wanted
from gale.server.errors import ApiError
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import json_response, to_json
from gale.server.lifecycle import Lifecycle
from gale.server.openai_answer import Answer, delta_object, finish_reason
from gale.server.openai_logprobs import chat_logprobs
from gale.server.openai_request import Asked, to_engine
from gale.server.openai_schema import ChatRequest
from gale.server.sse import EventStream, ServerSentEvent, StreamLimits


def routes(engine: Engine, lifecycle: Lifecycle, limits: StreamLimits) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/chat/completions", response_model=None, openapi_extra=request_schema(ChatRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, ChatRequest)
        metered = engine_of(request, engine)
        asked = to_engine(body, metered)
        if body.stream:
            chunks = _stream(metered, asked, include_usage=body.include_usage)
            return EventStream(chunks, lifecycle, limits=limits)
        work = _whole(metered, asked)
        answered = await while_wanted(request.receive, lifecycle, work)
        return await json_response(answered, long=asked.each[0].logprobs is not None)

    return router


async def _whole(engine: Engine, asked: Asked) -> dict[str, Any]:
    head = _head(engine, asked.each[0], "chat.completion")
    answers = [Answer() for _ in asked.each]
    ends: dict[int, Finished] = {}
    events = _answers(engine, asked)
    try:
        async for index, event in events:
            if isinstance(event, Finished):
                ends[index] = event
            else:
                answers[index].add(event)
    finally:
        await events.aclose()

    def choice(index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": answer.message(),
            "logprobs": _logprobs(engine, asked, answer.scores),
            "finish_reason": answer.finish_reason(ends[index]),
        }

    choices = [
        # In a thread where there are scores, which may be very many.
        await asyncio.to_thread(choice, index, answer) if answer.scores else choice(index, answer)
        for index, answer in enumerate(answers)
    ]
    return {**head, "choices": choices, "usage": _usage(ends)}


async def _stream(engine: Engine, asked: Asked, *, include_usage: bool) -> AsyncGenerator[ServerSentEvent, None]:
    """Chunks in the order that OpenAI's clients rely on.

    First the role alone for each choice in order, then text, then an empty delta with the reason, then (if asked for)
    the usage without choices, then ``[DONE]``. ``id``, ``created`` and ``model`` are the same in all.
    """
    head = _head(engine, asked.each[0], "chat.completion.chunk")
    if include_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> ServerSentEvent:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return ServerSentEvent(to_json({**head, "choices": [choice]}))

    called: set[int] = set()
    ends: dict[int, Finished] = {}
    events = _answers(engine, asked)
    begun = False
    try:
        async for index, event in events:
            if not begun:
                # Only now: what the engine refuses before its first event is still an ordinary HTTP error.
                for place in range(len(asked.each)):
                    yield chunk(place, {"role": "assistant", "content": ""})
                begun = True
            if isinstance(event, Finished):
                ends[index] = event
                yield chunk(index, {}, finish_reason(event, called=index in called))
                continue
            if isinstance(event, ToolCallDelta):
                called.add(index)
            scores = [event.score] if isinstance(event, TextDelta) and event.score else []
            yield chunk(index, delta_object(event), logprobs=_logprobs(engine, asked, scores))
    finally:
        await events.aclose()
    if include_usage:
        yield ServerSentEvent(to_json({**head, "choices": [], "usage": _usage(ends)}))
    yield ServerSentEvent("[DONE]")


def _answers(engine: Engine, asked: Asked) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all choices. The engine reads the prompt that they share once, where it can."""
    return merged(answer(engine, asked, sampling) for sampling in asked.each)


async def answer(engine: Engine, asked: Asked, sampling: SamplingParams) -> AsyncGenerator[Event, None]:
    """The events of one choice, the last one :class:`Finished`. Raises what clients are told."""
    events = engine.chat(asked.messages, sampling, asked.tools)
    try:
        async for event in events:
            yield event
            if isinstance(event, Finished):
                return
    except GrammarError as error:
        raise ApiError(400, error.message, code="invalid_value", param=asked.grammar_field) from error
    finally:
        await events.aclose()
    raise EngineFailedError("The model's answer ended without an end.")


def _logprobs(engine: Engine, asked: Asked, scores: list[TokenScore]) -> dict[str, Any] | None:
    return None if asked.each[0].logprobs is None else chat_logprobs(engine, scores, as_ids=asked.as_ids)


def _head(engine: Engine, sampling: SamplingParams, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": sampling.adapter or engine.model_id,
    }


def _usage(ends: dict[int, Finished]) -> dict[str, Any]:
    """Counts of all choices; the prompt that they share counts once."""
    return usage_object([ends[index].usage for index in sorted(ends)], copies=len(ends))


def usage_object(counts: list[Usage], copies: int) -> dict[str, Any]:
    """Token counts of choices as OpenAI names them, ``copies`` for each prompt, which counts once."""
    prompt = sum(usage.prompt_tokens for usage in counts[::copies])
    completion = sum(usage.completion_tokens for usage in counts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in counts[::copies])},
    }
