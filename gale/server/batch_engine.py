"""The engine as batches use it: whoever waits for an answer is served before them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, TypeVar, cast

from gale.engine.request import Engine, Event, PromptScores, Reader, SamplingParams
from gale.engine.upstream import UpstreamEngine
from gale.text.template import Message

AnyEngine = TypeVar("AnyEngine", bound=Engine)

PRIORITY = 10  # requests of people have 0


def patient(engine: AnyEngine) -> AnyEngine:
    """``engine``, whose answers may be put off; another server's as it is, since few know such a thing."""
    if isinstance(engine, UpstreamEngine):
        return engine
    return cast(AnyEngine, (_PatientReader if isinstance(engine, Reader) else _PatientEngine)(engine))


def _own(name: str) -> Any:
    # Defined one by one, not by __getattr__, which newer Pythons do not count where a protocol is checked.
    return property(lambda self: getattr(self._engine, name))


class _PatientEngine:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    model_id = _own("model_id")
    adapters = _own("adapters")
    context_length = _own("context_length")
    count_prompt_tokens = _own("count_prompt_tokens")
    encode = _own("encode")
    encode_chat = _own("encode_chat")
    token_bytes = _own("token_bytes")
    close = _own("close")

    def chat(
        self, messages: list[Message], sampling: SamplingParams, *more: Any, **named: Any
    ) -> AsyncGenerator[Event, None]:
        return self._engine.chat(messages, replace(sampling, priority=PRIORITY), *more, **named)

    def complete(
        self, prompt: list[int], sampling: SamplingParams, *more: Any, **named: Any
    ) -> AsyncGenerator[PromptScores | Event, None]:
        return self._engine.complete(prompt, replace(sampling, priority=PRIORITY), *more, **named)


class _PatientReader(_PatientEngine):
    embedding_size = _own("embedding_size")
    encode_text = _own("encode_text")
    embed = _own("embed")
    decide = _own("decide")
