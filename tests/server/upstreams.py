"""Asking an upstream in a test: an engine that is connected for as long as one piece of work takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from gale.engine.request import Event, Finished, SamplingParams, TextDelta
from gale.engine.upstream import UpstreamEngine
from gale.text.template import Message
from tests.server.raw_server import Exchange


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


async def all_of(events: AsyncGenerator[Any, None]) -> list[Any]:
    return [each async for each in events]


def on(url: str, work: Callable[[UpstreamEngine], Awaitable[Any]], **options: Any) -> Any:
    """What ``work`` gives with an engine that is connected to ``url``."""

    async def run() -> Any:
        engine = await asyncio.to_thread(UpstreamEngine.connect, url, **options)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def ask(url: str, sampling: SamplingParams | None = None, text: str = "hi", **options: Any) -> tuple[str, Finished]:
    """The text of an answer and its end."""
    chosen = sampling or SamplingParams()
    events: list[Event] = on(url, lambda engine: all_of(engine.chat(user(text), chosen)), **options)
    assert isinstance(events[-1], Finished)
    return "".join(each.text for each in events if isinstance(each, TextDelta)), events[-1]


def whole(*parts: bytes, **headers: str) -> Callable[[Exchange, Any], None]:
    return lambda exchange, _: exchange.stream(*parts, headers=headers)
