"""What was read before is not read again, and nobody can tell from the answers: in bf16 not even from a bit of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gale.engine import prefix_cache
from gale.engine.adapters import Adapter
from gale.engine.batcher import Batcher
from gale.engine.sequence import Sequence
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.recorded import Recorded, make_bf16_model, run

KINDS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}]


@pytest.fixture(scope="module")
def bf16_model(tokenizer: Tokenizer) -> Decoder:
    return make_bf16_model(tokenizer)


@pytest.fixture
def rows(bf16_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model reads in each step."""
    counts: list[int] = []
    forward = bf16_model.forward

    def counted(ids_N: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
        counts.append(len(ids_N))
        return forward(ids_N, positions_N, attend)

    monkeypatch.setattr(bf16_model, "forward", counted)
    return counts


def make_batcher(model: Decoder, tokens: int = 10_000, *, prefix_cache: bool = True, **options: int) -> Batcher:
    return Batcher(
        model,
        **{"max_running": 8, "prefill_chunk": 48, **options},
        max_cached_tokens=tokens,
        prefix_cache=prefix_cache,
    )


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def alike(tokenizer: Tokenizer) -> list[Recorded]:
    """Prompts that begin as others do: wholly, by a few blocks, by part of a block, or not at all."""
    shared, other = words(100), words(70, seed=1)
    prompts = [shared, shared, shared[:50] + other, shared[:50] + words(9, 2), shared + other, other, other[:5]]
    return [
        Recorded(tokenizer, prompt, max_tokens=8, logprobs=2, prompt_logprobs=place == 4, **KINDS[place % 2])
        for place, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("tokens", [10_000, 230])
def test_answers_are_the_same_with_and_without(
    bf16_model: Decoder, tokenizer: Tokenizer, rows: list[int], together: bool, tokens: int
) -> None:
    plain = run(make_batcher(bf16_model, prefix_cache=False), alike(tokenizer), together=together)
    read = sum(rows)
    rows.clear()
    batcher = make_batcher(bf16_model, tokens)
    for _ in range(2):
        assert run(batcher, alike(tokenizer), together=together) == plain
        assert batcher.cached_tokens == 0
        assert 0 < batcher.kept_tokens <= tokens
    assert sum(rows) < 2 * read


def test_several_answers_to_one_prompt_read_it_once(bf16_model: Decoder, tokenizer: Tokenizer, rows: list[int]) -> None:
    prompt, answers = words(200), 6
    sequences = [Recorded(tokenizer, prompt, max_tokens=5, seed=seed) for seed in range(answers)]
    run(make_batcher(bf16_model), sequences)
    assert [sequence.cached_tokens for sequence in sequences] == [0] + [199] * (answers - 1)
    assert sum(rows) == 200 + (answers - 1) + answers * 4
    assert len({tuple(sequence.generated) for sequence in sequences}) == answers


def test_the_next_turn_of_a_conversation_reads_what_is_new(
    bf16_model: Decoder, tokenizer: Tokenizer, rows: list[int]
) -> None:
    batcher = make_batcher(bf16_model)
    first = Recorded(tokenizer, words(150), max_tokens=20, temperature=0)
    run(batcher, [first])
    rows.clear()
    second = Recorded(tokenizer, [*first.tokens, *words(30, 5)], max_tokens=1)
    run(batcher, [second])
    assert second.cached_tokens == 169  # its answer's last token was never read
    assert sum(rows) == 31
    assert batcher.kept_tokens == 200  # one sequence, not two


def test_what_is_kept_gives_way_before_any_running_sequence_does(
    bf16_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batcher, "_preempt", lambda *_: pytest.fail("nobody needs to be preempted"))
    batcher = make_batcher(bf16_model, 400)
    for seed in range(4):
        pair = [Recorded(tokenizer, words(100, 2 * seed + one), max_tokens=20) for one in range(2)]
        for sequence in pair:
            batcher.add(sequence)
        while not batcher.idle:
            batcher.step()
            assert batcher.cached_tokens + batcher.kept_tokens <= 400
        assert batcher.kept_tokens > 400 - 2 * 119


def test_the_least_recently_used_goes_first(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    batcher = make_batcher(bf16_model, 420)

    def ask(seed: int) -> int:
        sequence = Recorded(tokenizer, words(100, seed), max_tokens=1)
        run(batcher, [sequence])
        return sequence.cached_tokens

    assert [ask(seed) for seed in (1, 2, 3)] == [0, 0, 0]
    assert [ask(seed) for seed in (1, 4, 1, 3, 2)] == [99, 0, 99, 99, 0]


def test_without_room_for_a_copy_the_cache_itself_is_taken(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    batcher = make_batcher(bf16_model, 220)
    run(batcher, [Recorded(tokenizer, words(150) + words(40, 1), max_tokens=1)])
    sequence = Recorded(tokenizer, words(150) + words(30, 2), max_tokens=1)
    run(batcher, [sequence])
    assert sequence.cached_tokens == 150
    assert batcher.kept_tokens == 180


def test_nothing_is_shared_across_adapters(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    batcher, prompt = make_batcher(bf16_model), words(100)
    one, two = Adapter("one", {}), Adapter("two", {})
    cached = []
    for adapter in (None, one, two, one, None):
        sequence = Recorded(tokenizer, prompt, max_tokens=1, adapter=adapter)
        run(batcher, [sequence])
        cached.append(sequence.cached_tokens)
    assert cached == [0, 0, 0, 99, 99]


def test_equal_hashes_of_unequal_tokens_cost_a_miss_and_nothing_else(
    bf16_model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(make_batcher(bf16_model, prefix_cache=False), alike(tokenizer))
    monkeypatch.setattr(prefix_cache, "_chain", lambda sequence: [1] * (len(sequence.tokens) // 16))
    batcher = make_batcher(bf16_model)
    assert run(batcher, alike(tokenizer)) == plain
    assert run(batcher, alike(tokenizer)) == plain


def test_a_sequence_waits_for_one_that_reads_the_same_but_not_for_ever(
    bf16_model: Decoder, tokenizer: Tokenizer
) -> None:
    batcher = make_batcher(bf16_model)
    leader, follower = (Recorded(tokenizer, words(200), max_tokens=3, seed=1) for _ in range(2))
    other = Recorded(tokenizer, words(40, 7), max_tokens=1)
    for sequence in (leader, follower, other):
        batcher.add(sequence)
    batcher.step()
    assert follower.cache is None
    assert other.cache is not None  # whoever has nothing to gain does not wait
    leader.cancelled = True
    while not batcher.idle:
        batcher.step()
    assert follower.cached_tokens >= 48  # what the leader had read
    assert len(follower.generated) == 3


def test_a_batcher_that_broke_keeps_nothing(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    batcher = make_batcher(bf16_model)
    run(batcher, [Recorded(tokenizer, words(60), max_tokens=2)])
    running: list[Sequence] = [Recorded(tokenizer, words(60, 1), max_tokens=9)]
    batcher.add(running[0])
    batcher.step()
    batcher.abandon(RuntimeError("broken"))
    assert (batcher.idle, batcher.cached_tokens, batcher.kept_tokens) == (True, 0, 0)
