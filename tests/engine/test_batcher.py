"""Memory goes to those who need it now, the urgent first; who lost it goes on later as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest

from gale.engine.batcher import Batcher
from gale.engine.kv_cache import SequenceCache
from gale.engine.pace import Pace
from gale.engine.request import EngineOverloadedError, Finished
from gale.engine.sequence import Sequence
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.recorded import Recorded, make_bf16_model, run
from tests.engine.test_batch_invariance import requests


@pytest.fixture(scope="module")
def bf16_model(tokenizer: Tokenizer) -> Decoder:
    return make_bf16_model(tokenizer)


def make_batcher(model: Decoder, tokens: int = 10_000, running: int = 8, chunk: int = 64) -> Batcher:
    return Batcher(model, max_running=running, max_cached_tokens=tokens, prefill_chunk=chunk)


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[Sequence]:
    """Which sequences lost their memory."""
    lost: list[Sequence] = []
    preempt = Batcher._preempt

    def noted(self: Batcher, sequence: Sequence) -> None:
        lost.append(sequence)
        preempt(self, sequence)

    monkeypatch.setattr(Batcher, "_preempt", noted)
    return lost


@pytest.mark.parametrize("tokens", [1, 120, 340])
def test_answers_are_the_same_however_little_memory_there_is(
    bf16_model: Decoder, tokenizer: Tokenizer, preempted: list[Sequence], tokens: int
) -> None:
    """Text, seeds and log-probabilities of prompt and answer, all to the bit."""
    plenty = run(make_batcher(bf16_model), requests(tokenizer, 9, shortest=30))
    assert not preempted
    batcher = make_batcher(bf16_model, tokens)
    assert run(batcher, requests(tokenizer, 9, shortest=30)) == plenty
    assert batcher.cached_tokens == 0
    assert bool(preempted) == (tokens > 1)


def test_a_prompt_that_is_interrupted_is_scored_once(
    bf16_model: Decoder, tokenizer: Tokenizer, preempted: list[Sequence]
) -> None:
    prompt = tokenizer.encode("The wind came over the hill. 门关上了。" * 12)
    wanted: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "logprobs": 1, "prompt_logprobs": True}
    [expected] = run(make_batcher(bf16_model), [Recorded(tokenizer, prompt, **wanted)])
    batcher = make_batcher(bf16_model, running=1, chunk=16)
    interrupted = Recorded(tokenizer, prompt, **wanted, priority=5)
    batcher.add(interrupted)
    for _ in range(3):
        batcher.step()
        batcher.step()
        batcher.add(Recorded(tokenizer, [7, 8, 9], max_tokens=2))
        batcher.step()
        batcher.step()
    while not batcher.idle:
        batcher.step()
    assert interrupted in preempted
    assert interrupted.answer == expected


def test_the_youngest_gives_way_and_the_oldest_never_does(
    bf16_model: Decoder, tokenizer: Tokenizer, preempted: list[Sequence]
) -> None:
    sequences = [Recorded(tokenizer, [20 + index] * 10, max_tokens=60) for index in range(4)]
    run(make_batcher(bf16_model, 130), sequences)
    assert sequences[0] not in preempted
    assert preempted[0] is sequences[3]


def test_the_urgent_start_first_and_take_the_place_of_others(
    bf16_model: Decoder, tokenizer: Tokenizer, preempted: list[Sequence]
) -> None:
    batcher, ends = make_batcher(bf16_model, running=2), []
    sequences: dict[str, Recorded] = {}

    def add(name: str, priority: int) -> None:
        sequences[name] = Recorded(tokenizer, [5, 6, 7], max_tokens=20, priority=priority, seed=1)
        batcher.add(sequences[name])

    for name in ("first", "second", "third"):
        add(name, 3)
    for _ in range(5):
        batcher.step()
    add("later", 3)
    add("urgent", 0)
    while not batcher.idle:
        batcher.step()
        ends += [name for name, sequence in sequences.items() if sequence.finished and name not in ends]
    assert preempted == [sequences["second"]]
    assert ends == ["first", "urgent", "second", "third", "later"]
    assert len({tuple(sequence.generated) for sequence in sequences.values()}) == 1


def test_nobody_who_is_answered_waits_for_a_long_prompt(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    batcher = make_batcher(bf16_model, chunk=16)
    answering = [Recorded(tokenizer, [30 + index], max_tokens=60) for index in range(3)]
    for sequence in answering:
        batcher.add(sequence)
    batcher.step()
    batcher.add(Recorded(tokenizer, [9] * 500, max_tokens=1))
    for _ in range(30):
        before = [len(sequence.tokens) for sequence in answering]
        batcher.step()
        assert [len(sequence.tokens) for sequence in answering] == [count + 1 for count in before]


def test_a_cancelled_sequence_s_memory_is_free_with_the_next_step(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    batcher = make_batcher(bf16_model, 350)
    long, short = Recorded(tokenizer, [9] * 300, max_tokens=50), Recorded(tokenizer, [8] * 40, max_tokens=9)
    for sequence in (long, short):
        batcher.add(sequence)
    for _ in range(3):
        batcher.step()
    assert 0 < batcher.cached_tokens < 300
    assert not short.generated
    long.cancelled = True
    batcher.step()
    assert isinstance(long.events[-1], Finished)
    assert long.events[-1].reason == "cancelled"
    assert (batcher.cached_tokens, len(short.generated)) == (40, 1)
    short.cancelled = True
    batcher.step()
    assert batcher.idle
    assert batcher.cached_tokens == 0


def test_where_the_system_has_no_memory_requests_wait_and_one_alone_is_refused(
    bf16_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make_batcher(bf16_model)
    reserve = SequenceCache.reserve

    def limited(self: SequenceCache, tokens: int, *, expected: int = 0) -> None:
        if batcher.cached_tokens + tokens > 400:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        reserve(self, tokens, expected=expected)

    expected = run(make_batcher(bf16_model), requests(tokenizer))
    monkeypatch.setattr(SequenceCache, "reserve", limited)
    assert run(batcher, requests(tokenizer)) == expected
    alone, beside = (Recorded(tokenizer, [9] * count, max_tokens=50) for count in (500, 300))
    batcher.add(alone)
    batcher.add(beside)
    while not batcher.idle:
        batcher.step()
    assert isinstance(alone.events[-1], EngineOverloadedError)
    assert isinstance(beside.events[-1], Finished)
    assert batcher.cached_tokens == 0


def test_chunks_follow_from_what_steps_were_measured_to_take() -> None:
    """A clock by numbers: a step of answers takes 30 ms, each token of a prompt 0.5 ms more."""
    pace = Pace(256, stretch=3.0)
    assert pace.chunk(0) == 256
    longest, chunks = 0.0, []
    for step in range(200):
        chunk = pace.chunk(8) if step > 5 else 0
        seconds = 0.030 + 0.0005 * chunk
        pace.note(8, chunk, seconds)
        longest = max(longest, seconds)
        chunks.append(chunk)
    assert longest <= 3 * 0.030
    assert max(chunks) == chunks[-1] == 112
    assert 3 <= chunks[6:].count(0) <= 8  # now and then one without a prompt, to measure anew


def test_a_pace_knows_the_least_and_the_most() -> None:
    slow, fast = Pace(256), Pace(256)
    for _ in range(20):
        slow.note(1, 0, 0.001)
        slow.note(1, 16, 1.0)
        fast.note(1, 0, 1.0)
        fast.note(1, 16, 1.0001)
    slow.note(1, 0, 0.001)
    fast.note(1, 0, 1.0)
    assert slow.chunk(1) == 16
    assert fast.chunk(1) == 256
