"""``POST /v1/messages`` and its ``count_tokens``: Anthropic's shape of a chat, for clients that speak that.

Blocks take the place of a message's text and calls; a stream names its events and says where each block begins and
ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gale.engine.request import Engine, Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from gale.platform.ids import new_id
from gale.server.anthropic_schema import CountRequest, MessagesRequest
from gale.server.caller import engine_of
from gale.server.disconnect import while_wanted
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle
from gale.server.openai_chat import answer
from gale.server.openai_request import Asked, to_engine
from gale.server.sse import EventStream, ServerSentEvent, StreamLimits


def routes(engine: Engine, lifecycle: Lifecycle, limits: StreamLimits) -> APIRouter:
    """Both."""
    router = APIRouter(prefix="/v1/messages", tags=["anthropic"])

    @router.post("", response_model=None, openapi_extra=request_schema(MessagesRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, MessagesRequest)
        metered = engine_of(request, engine)
        asked = await asyncio.to_thread(_asked, metered, body)
        if body.stream:
            return EventStream(
                _stream(metered, asked),
                lifecycle,
                error_name="error",
                error_body=lambda error: error.anthropic_body,
                limits=limits,
            )
        return JSONResponse(await while_wanted(request.receive, lifecycle, _whole(metered, asked)))

    @router.post("/count_tokens", openapi_extra=request_schema(CountRequest))
    async def count(request: Request) -> dict[str, int]:
        body = await read_json(request, CountRequest)
        metered = engine_of(request, engine)
        asked = await asyncio.to_thread(lambda: to_engine(body.chat(), metered))
        return {"input_tokens": await asyncio.to_thread(engine.count_prompt_tokens, asked.messages, asked.tools)}

    return router


class _Blocks:
    """The blocks of one answer as they grow; every method yields a stream's events."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []
        self._call: int | None = None
        self._open = False

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case TextDelta(text) if text:
                yield from self._begin({"type": "text", "text": ""})
                self.blocks[-1]["text"] += text
                yield self._delta({"type": "text_delta", "text": text})
            case ReasoningDelta(text):
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                self.blocks[-1]["thinking"] += text
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCallDelta(index, call_id, name, arguments):
                if index != self._call:
                    yield from self.close()
                    yield from self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                    self._call = index
                self._arguments.append(arguments)
                yield self._delta({"type": "input_json_delta", "partial_json": arguments})

    def close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open, if one is."""
        if not self._open:
            return
        if self._call is not None:
            self.blocks[-1]["input"] = _arguments("".join(self._arguments))
        self._open, self._call, self._arguments = False, None, []
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    @property
    def called(self) -> bool:
        """Whether a function was called."""
        return any(block["type"] == "tool_use" for block in self.blocks)

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open and self.blocks[-1]["type"] == block["type"]:
            return
        yield from self.close()
        self.blocks.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


async def _whole(engine: Engine, asked: Asked) -> dict[str, Any]:
    message: dict[str, Any] = {}
    blocks = _Blocks()
    events = _events(engine, asked, blocks)
    try:
        async for event in events:
            if event["type"] == "message_start":
                message = event["message"]
            elif event["type"] == "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    finally:
        await events.aclose()
    return {**message, "content": blocks.blocks}


async def _stream(engine: Engine, asked: Asked) -> AsyncGenerator[ServerSentEvent, None]:
    events = _events(engine, asked, _Blocks())
    try:
        async for event in events:
            yield ServerSentEvent(to_json(event), event["type"])
    finally:
        await events.aclose()


async def _events(engine: Engine, asked: Asked, blocks: _Blocks) -> AsyncGenerator[dict[str, Any], None]:
    answering = answer(engine, asked, asked.each[0])
    prompt_tokens = await asyncio.to_thread(engine.count_prompt_tokens, asked.messages, asked.tools)
    begun = False
    try:
        async for event in answering:
            if not begun:
                begun = True
                yield {"type": "message_start", "message": _message(engine, asked, prompt_tokens)}
            if isinstance(event, Finished):
                for shown in blocks.close():
                    yield shown
                delta = {"stop_reason": _stop_reason(event, blocks), "stop_sequence": event.stop}
                yield {"type": "message_delta", "delta": delta, "usage": _usage(event.usage)}
                yield {"type": "message_stop"}
                return
            for shown in blocks.add(event):
                yield shown
    finally:
        await answering.aclose()


def _message(engine: Engine, asked: Asked, prompt_tokens: int) -> dict[str, Any]:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": asked.each[0].adapter or engine.model_id,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(Usage(prompt_tokens, 0)),
    }


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts what was read anew and what was read before apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _stop_reason(event: Finished, blocks: _Blocks) -> str:
    if event.reason == "length":
        return "max_tokens"
    if event.stop is not None:
        return "stop_sequence"
    return "tool_use" if blocks.called else "end_turn"


def _asked(engine: Engine, body: MessagesRequest) -> Asked:
    chat = body.chat(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, max_tokens=body.max_tokens)
    asked = to_engine(chat, engine)
    # Set here, as there may be more of them than OpenAI allows.
    return replace(asked, each=[replace(each, stop=tuple(body.stop_sequences or ())) for each in asked.each])


def _arguments(text: str) -> Any:
    """The object that was written, or an empty one where the answer was cut short inside it."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
