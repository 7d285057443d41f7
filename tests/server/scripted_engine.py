"""An engine whose answers follow from the last message, so that tests can meet every way in which answers end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    EngineOverloadedError,
    Event,
    Finished,
    SamplingParams,
    TextDelta,
    Tools,
    Usage,
)
from gale.text.template import Message


class ScriptedEngine:
    """Says the last paragraph back word by word, unless its first word names another script. A token is a word."""

    model_id = "scripted/one"
    adapters: tuple[str, ...] = ()
    context_length = 100

    def __init__(self) -> None:
        self.active = 0
        self.finished = 0
        self.closed_early = 0
        self.prompts: list[list[Message]] = []
        self.sampling: list[SamplingParams] = []

    def count_prompt_tokens(self, messages: list[Message], tools: Tools | None = None) -> int:
        return sum(len(message["content"].split()) + 1 for message in messages)

    async def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        prompt = self.count_prompt_tokens(messages)
        if prompt >= self.context_length:
            raise ContextLengthError(prompt, self.context_length)
        self.prompts.append(messages)
        self.sampling.append(sampling)
        self.active += 1
        whole = False
        try:
            async for event in self._script(messages[-1]["content"].rpartition("\n\n")[2], prompt, sampling):
                whole = isinstance(event, Finished)
                yield event
        finally:
            self.active -= 1
            self.finished += whole
            self.closed_early += not whole

    async def _script(self, content: str, prompt: int, sampling: SamplingParams) -> AsyncGenerator[Event, None]:
        words = content.split()
        match words[:1]:
            case ["endless"]:
                while True:
                    yield TextDelta("tick ")
                    await asyncio.sleep(0.01)
            case ["flood"]:
                while True:
                    yield TextDelta("x" * 10_000)
                    await asyncio.sleep(0)
            case ["silent"]:
                await asyncio.Event().wait()
            case ["late"]:
                await asyncio.sleep(0.5)
            case ["overloaded"]:
                raise EngineOverloadedError("The queue is full.")
            case ["breaks"]:
                yield TextDelta("half ")
                raise EngineFailedError("The engine broke.")
            case ["bug"]:
                yield TextDelta("half ")
                raise RuntimeError("secret detail")
            case ["bug-at-once"]:
                raise RuntimeError("secret detail")
            case ["unfinished"]:
                yield TextDelta("half ")
                return
            case ["cancelled"]:
                yield TextDelta("half ")
                yield Finished("cancelled", Usage(prompt, 1))
                return
        limit = min(sampling.max_tokens or self.context_length, self.context_length - prompt)
        for index, word in enumerate(words[:limit]):
            yield TextDelta(word if index == 0 else f" {word}")
            await asyncio.sleep(0)
        yield Finished("length" if len(words) > limit else "stop", Usage(prompt, min(len(words), limit)))

    async def close(self) -> None:
        return
