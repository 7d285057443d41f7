"""Whatever is asked, in whatever order, with however little memory: everyone is answered as if alone, nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gale.engine.batcher import Batcher
from gale.engine.kv_cache import SequenceCache
from gale.engine.pace import Pace
from gale.engine.request import EngineOverloadedError, Finished
from gale.engine.speculation import Drafter, DraftModel, NgramDrafter, Speculation
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.recorded import Recorded, make_bf16_model, run

# Few beginnings, so that many are alike; ends of any kind.
BEGINNINGS = [[], [7] * 16, list(range(30, 62)), [20, 21] * 20, list(range(30, 55))]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 0.7, "seed": 5, "top_k": 30, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.5, "logit_bias": ((3, -50.0), (21, 2.0))},
    {"temperature": 1.5, "seed": 6, "frequency_penalty": 1.0, "top_p": 0.8},
]


@dataclass(frozen=True)
class Ask:
    """One request, when it comes, and when its client leaves."""

    prompt: tuple[int, ...]
    sampling: int
    max_tokens: int
    scores: bool
    stops: tuple[str, ...]
    priority: int
    namespace: int
    comes: int
    leaves: int | None

    def sequence(self, tokenizer: Tokenizer) -> Recorded:
        sequence = Recorded(
            tokenizer,
            list(self.prompt),
            **SAMPLING[self.sampling],
            max_tokens=self.max_tokens,
            logprobs=1 if self.scores else None,
            prompt_logprobs=self.scores,
            stop=self.stops,
            stop_token_ids=(11, 40),
            priority=self.priority,
        )
        sequence.namespace = self.namespace
        return sequence


prompts = st.builds(
    lambda beginning, rest: (*beginning, *rest),
    st.sampled_from(BEGINNINGS),
    st.lists(st.integers(0, 372), min_size=1, max_size=30),
)
asks = st.builds(
    Ask,
    prompt=prompts | st.sampled_from([tuple(beginning) for beginning in BEGINNINGS[1:]]),
    sampling=st.integers(0, len(SAMPLING) - 1),
    max_tokens=st.integers(0, 12),
    scores=st.booleans(),
    stops=st.sampled_from([(), ("e",), ("the", " a", "xyz"), tuple(f"stop {number}" for number in range(1000))]),
    priority=st.integers(-1, 1),
    namespace=st.integers(0, 1),
    comes=st.integers(0, 10),
    leaves=st.none() | st.integers(0, 20),
)


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> tuple[Decoder, Decoder]:
    return make_bf16_model(tokenizer), make_bf16_model(tokenizer, layers=1)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    asked=st.lists(asks, min_size=1, max_size=7),
    tokens=st.sampled_from([1, 50, 90, 150, 1000]),
    running=st.integers(1, 4),
    chunk=st.sampled_from([3, 16, 64]),
    prefix_cache=st.booleans(),
    drafter=st.sampled_from(["none", "n-gram", "model"]),
    paced=st.booleans(),
    memory=st.sampled_from([None, None, 60, 120]),
)
def test_everyone_is_answered_as_if_alone(
    tokenizer: Tokenizer,
    models: tuple[Decoder, Decoder],
    asked: list[Ask],
    tokens: int,
    running: int,
    chunk: int,
    prefix_cache: bool,
    drafter: str,
    paced: bool,
    memory: int | None,
) -> None:
    model, draft = models
    drafters: dict[str, Drafter | None] = {
        "none": None,
        "n-gram": NgramDrafter(),
        "model": DraftModel(draft, chunk=chunk),
    }
    chosen = drafters[drafter]
    batcher = Batcher(
        model,
        max_running=running,
        max_cached_tokens=tokens,
        prefill_chunk=chunk,
        prefix_cache=prefix_cache,
        pace=Pace(chunk) if paced else None,
        speculation=None if chosen is None else Speculation(chosen),
    )
    sequences = [ask.sequence(tokenizer) for ask in asked]
    reserve = SequenceCache.reserve

    def limited(self: SequenceCache, more: int, *, expected: int = 0) -> None:
        if memory is not None and batcher.cached_tokens + more > memory:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        reserve(self, more, expected=expected)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceCache, "reserve", limited)
        for step in range(3000):
            for ask, sequence in zip(asked, sequences, strict=True):
                if ask.comes == step:
                    batcher.add(sequence)
                if ask.leaves == step:
                    sequence.cancelled = True
            if step > 10 and batcher.idle:
                break
            batcher.step()
            assert len(batcher._running) <= running
            if len(batcher._running) > 1:
                assert batcher.cached_tokens + batcher.kept_tokens <= max(tokens, 1)
    assert batcher.idle, "it never ended"
    assert batcher.cached_tokens == 0
    batcher._prefixes.shrink(0)
    assert not batcher._prefixes._by_block
    assert not batcher._prefixes._running
    for ask, sequence in zip(asked, sequences, strict=True):
        if isinstance(sequence.events[-1], EngineOverloadedError):
            assert memory is not None
            continue
        last = sequence.events[-1]
        assert isinstance(last, Finished)
        assert sum(isinstance(event, Finished) for event in sequence.events) == 1
        alone = ask.sequence(tokenizer)
        run(Batcher(model, max_running=1, max_cached_tokens=1000, prefill_chunk=64), [alone])
        if last.reason == "cancelled":
            assert ask.leaves is not None
            assert alone.generated[: len(sequence.generated)] == sequence.generated
        else:
            assert sequence.answer == alone.answer
