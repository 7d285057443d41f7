"""A client that leaves frees what its answer holds with the model's next step, at whatever stage it leaves.

Counted in steps of the model and not in seconds: a step of any model that is of use takes far less than one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from gale.engine.local import LocalEngine
from gale.engine.options import EngineOptions
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, begin, eventually

CHUNK = 16


class Gate:
    """Lets the model take as many steps as are allowed."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.taken, self.tokens_read = 0, 0
        self._forward, self._allowed = forward, threading.Semaphore(0)

    def __call__(self, ids_N: Tensor, *rest: Any) -> Tensor:
        self._allowed.acquire()
        self.taken += 1
        self.tokens_read += len(ids_N)
        return self._forward(ids_N, *rest)

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)


@pytest.fixture
def gate(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(model.forward)
    monkeypatch.setattr(model, "forward", gate)
    yield gate
    gate.allow(100_000)


@pytest.fixture
def engine(model: Decoder, tokenizer: Tokenizer, gate: Gate) -> Iterator[LocalEngine]:
    """Answers one after another, and reads prompts in small chunks."""
    options = EngineOptions(max_running=1, prefill_chunk=CHUNK, ngram_drafts=False)
    engine = LocalEngine(model, tokenizer, model_id="tiny", options=options)
    yield engine
    gate.allow(100_000)
    asyncio.run(engine.close())


def chat(words: int, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": "风" * words}]
    return {"model": "tiny", "messages": messages, "stream": stream, "max_tokens": 400, "temperature": 0}


@pytest.mark.parametrize(
    ("words", "steps"), [(1, 30), (150, 3)], ids=["while it is answered", "while its prompt is read"]
)
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_memory_with_the_next_step(
    launch: Callable[..., Live], engine: LocalEngine, gate: Gate, words: int, steps: int, stream: bool
) -> None:
    live = launch(engine=engine)
    sock = begin(live, "/v1/chat/completions", chat(words, stream=stream))
    gate.allow(steps)
    eventually(lambda: gate.taken == steps and engine.stats().cached_tokens > 0)
    sock.close()
    eventually(lambda: engine._unfinished == 0)  # noticed while the model stands still
    assert gate.taken == steps
    gate.allow(1)  # the step that was going on
    eventually(lambda: engine.stats().running == 0 and engine.stats().cached_tokens == 0)
    assert gate.taken <= steps + 1


def test_who_leaves_while_waiting_is_never_read(launch: Callable[..., Live], engine: LocalEngine, gate: Gate) -> None:
    live = launch(engine=engine)
    first = begin(live, "/v1/chat/completions", {**chat(1, stream=True), "max_tokens": 20})
    gate.allow(5)
    eventually(lambda: gate.taken == 5)
    second = begin(live, "/v1/chat/completions", chat(150, stream=False))
    eventually(lambda: engine._unfinished == 2)
    gate.allow(1)
    eventually(lambda: engine.stats().waiting == 1)
    second.close()
    eventually(lambda: engine._unfinished == 1)
    gate.allow(100)
    answer = b""
    while b"[DONE]" not in answer:
        answer += first.recv(65536)
    eventually(lambda: engine.stats().running == engine.stats().waiting == 0)
    assert gate.tokens_read < 60, "the prompt of 150 characters was not read"
