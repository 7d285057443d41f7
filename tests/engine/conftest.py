"""Engines over the tiny model, and the shortest ways to ask them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gale.engine.local import LocalEngine
from gale.engine.request import Finished, SamplingParams, TextDelta
from gale.model.transformer import Decoder
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer


@pytest.fixture
def make_engine(tokenizer: Tokenizer, model: Decoder) -> Iterator[Callable[..., LocalEngine]]:
    engines: list[LocalEngine] = []

    def make(decoder: Decoder = model, **options: Any) -> LocalEngine:
        engines.append(LocalEngine(decoder, tokenizer, model_id="tiny", **options))
        return engines[-1]

    yield make
    for engine in engines:
        asyncio.run(engine.close())


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


async def answer(engine: LocalEngine, text: str, **sampling: Any) -> tuple[str, Finished]:
    """The whole text of an answer, and how it ended."""
    parts: list[str] = []
    async for event in engine.chat(user(text), SamplingParams(**sampling)):
        if isinstance(event, TextDelta):
            parts.append(event.text)
        elif isinstance(event, Finished):
            return "".join(parts), event
    raise AssertionError("the answer ended without Finished")
