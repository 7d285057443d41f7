"""An engine through the eyes of one caller, for one request. See :mod:`gale.platform.metering`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

from gale.engine.request import (
    Decision,
    Embeddings,
    Engine,
    Event,
    Finished,
    Pooling,
    Progress,
    PromptScores,
    Reader,
    SamplingParams,
    Tools,
    Usage,
)
from gale.platform.admission import Admission, Ticket
from gale.platform.watch import Watch
from gale.text.template import Message

_Event = TypeVar("_Event")


class MeteredEngine:
    """Implements :class:`gale.engine.request.Engine`; made by :meth:`gale.platform.metering.Metering.engine`."""

    def __init__(self, engine: Engine, admission: Admission, watch: Watch) -> None:
        self.admission = admission
        self._engine = engine
        self._watch = watch

    @property
    def model_id(self) -> str:
        """The model's name."""
        return self._engine.model_id

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that the caller may use."""
        return tuple(name for name in self._engine.adapters if self.admission.may_use(name))

    @property
    def names(self) -> tuple[str, ...]:
        """What the caller may ask for: adapters, and the model itself if that is allowed."""
        return (*((self.model_id,) if self.admission.may_use(self.model_id) else ()), *self.adapters)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context_length

    def count_prompt_tokens(
        self, messages: list[Message], tools: Tools | None = None, *, adapter: str | None = None
    ) -> int:
        """See :meth:`gale.engine.request.Engine.count_prompt_tokens`."""
        more: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
        return self._engine.count_prompt_tokens(messages, *([tools] if tools else []), **more)

    def encode(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode`."""
        return self._engine.encode(text)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode_chat`."""
        return self._engine.encode_chat(messages)

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """See :meth:`gale.engine.request.Engine.token_bytes`."""
        return self._engine.token_bytes(token, control_tokens=control_tokens)

    def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`gale.engine.request.Engine.chat`; raises what :meth:`Admission.begin` does before any event."""

        def count() -> int:
            return self.count_prompt_tokens(messages, tools, adapter=sampling.adapter)

        progress = Progress()
        events = self._engine.chat(messages, replace(sampling, progress=progress), tools)
        return self._answer(events, sampling, progress, messages, count)

    def complete(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[PromptScores | Event, None]:
        """See :meth:`gale.engine.request.Engine.complete`; raises what :meth:`chat` does."""
        progress = Progress()
        events = self._engine.complete(prompt, replace(sampling, progress=progress))
        return self._answer(events, sampling, progress, prompt, lambda: len(prompt))

    async def close(self) -> None:
        """The request is over; the engine goes on."""

    async def _answer(
        self,
        events: AsyncGenerator[_Event, None],
        sampling: SamplingParams,
        progress: Progress,
        prompt: object,
        count: Callable[[], int],
    ) -> AsyncGenerator[_Event, None]:
        usage: Usage | None = None
        ticket: Ticket | None = None
        stopped, said = False, 0
        began = perf_counter()
        try:
            ticket = await self.admission.begin(sampling.adapter, "completions", prompt, count, sampling.max_tokens)
            async for event in events:
                if isinstance(event, Finished):
                    usage = event.usage
                elif not isinstance(event, PromptScores):
                    now = perf_counter()
                    (self._watch.gap if said else self._watch.first_token)(now - began)
                    began = now
                    said += 1
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            stopped = True
            raise
        finally:
            prompt_tokens = ticket.prompt_tokens if ticket is not None else None
            try:
                await events.aclose()
                if stopped and usage is None and progress.usage is None and said and prompt_tokens is None:
                    prompt_tokens = await asyncio.to_thread(count)
            finally:  # also where a server that stops has no patience with what stands before
                if usage is None and stopped:  # what our own failure cut short costs nothing
                    usage = progress.usage or Usage((prompt_tokens or 0) if said else 0, said)
                if ticket is not None:
                    ticket.end(usage)


class MeteredReader(MeteredEngine):
    """Implements :class:`gale.engine.request.Reader`."""

    _engine: Reader

    @property
    def embedding_size(self) -> int:
        """Numbers of a whole vector."""
        return self._engine.embedding_size

    def encode_chat(self, messages: list[Message], *, adapter: str | None = None) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_chat`."""
        return self._engine.encode_chat(messages, adapter=adapter)

    def encode_text(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_text`."""
        return self._engine.encode_text(text)

    async def embed(
        self,
        inputs: Sequence[str | list[int]],
        *,
        pooling: Pooling | None = None,
        normalise: bool = True,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> Embeddings:
        """See :meth:`gale.engine.request.Reader.embed`; raises what :meth:`Admission.begin` does."""
        texts = await asyncio.to_thread(
            lambda: [text if isinstance(text, list) else self._engine.encode_text(text) for text in inputs]
        )
        tokens = sum(map(len, texts))
        ticket = await self.admission.begin(adapter, "embeddings", None, lambda: tokens, 0)
        used: Usage | None = None
        try:
            found = await self._engine.embed(
                texts, pooling=pooling, normalise=normalise, dimensions=dimensions, adapter=adapter
            )
            used = Usage(found.prompt_tokens, 0)
            return found
        except asyncio.CancelledError:
            used = Usage(tokens, 0)
            raise
        finally:
            ticket.end(used)

    async def decide(self, prompt: list[int], labels: Sequence[str], *, adapter: str | None = None) -> Decision:
        """See :meth:`gale.engine.request.Reader.decide`; raises what :meth:`Admission.begin` does."""
        # No token of a label is shorter than a byte.
        most = len(prompt) + sum(len(label.encode()) for label in labels)
        ticket = await self.admission.begin(adapter, "completions", None, lambda: most, 0)
        used: Usage | None = None
        try:
            found = await self._engine.decide(prompt, labels, adapter=adapter)
            used = Usage(found.prompt_tokens, 0)
            return found
        except asyncio.CancelledError:
            used = Usage(len(prompt), 0)
            raise
        finally:
            ticket.end(used)
