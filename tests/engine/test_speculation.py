"""Guessing ahead changes how many steps an answer takes and nothing else: in bf16 not a bit of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.core.errors import ModelError
from gale.engine.batcher import Batcher
from gale.engine.local import LocalEngine
from gale.engine.sequence import Sequence
from gale.engine.speculation import Drafter, DraftModel, NgramDrafter, Speculation
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.recorded import Recorded, make_bf16_model, run
from tests.tiny_model import make_model

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.5, "seed": 2, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "prompt_logprobs": True},
]


@pytest.fixture(scope="module")
def bf16_model(tokenizer: Tokenizer) -> Decoder:
    return make_bf16_model(tokenizer)


def requests(tokenizer: Tokenizer, **more: Any) -> list[Recorded]:
    prompts = [[20, 21, 22] * 6, [5], [9, 9, 9, 9], list(range(40, 60))]
    return [
        Recorded(tokenizer, prompt, max_tokens=9 + index, logprobs=1, **kind, **more)
        for index, (prompt, kind) in enumerate(zip(prompts, KINDS, strict=True))
    ]


def make_batcher(model: Decoder, drafter: Drafter | None = None, **options: Any) -> Batcher:
    return Batcher(
        model,
        **{"max_running": 8, "prefill_chunk": 64, "max_cached_tokens": 10_000, **options},
        speculation=None if drafter is None else Speculation(drafter),
    )


class Guesser:
    """Knows the answers beforehand, says some of them wrong, and counts."""

    def __init__(self, answers: dict[int, list[int]], right: float) -> None:
        self.answers, self.right = answers, right
        self.random = random.Random(0)
        self.guessed = 0
        self.forgotten: list[Sequence] = []

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        drafts = []
        for sequence, count in wanted:
            rest = self.answers[sequence.prompt_tokens][len(sequence.generated) :][:count]
            drafts.append([token if self.random.random() < self.right else 1 for token in rest])
            self.guessed += len(rest)
        return drafts

    def verified(self, sequence: Sequence) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)


@pytest.mark.parametrize("right", [1.0, 0.7, 0.0])
def test_right_and_wrong_guesses_leave_answers_as_they_are(
    bf16_model: Decoder, tokenizer: Tokenizer, right: float
) -> None:
    plain = requests(tokenizer)
    expected = run(make_batcher(bf16_model), plain)
    guesser = Guesser({sequence.prompt_tokens: sequence.generated for sequence in plain}, right)
    batcher = make_batcher(bf16_model, guesser)
    sequences = requests(tokenizer)
    for sequence in sequences:
        batcher.add(sequence)
    steps = 0
    while not batcher.idle:
        batcher.step()
        steps += 1
    assert [sequence.answer for sequence in sequences] == expected
    assert batcher.cached_tokens == 0
    assert set(guesser.forgotten) == set(sequences)
    assert steps < 8 if right == 1 else steps <= 13
    if right == 0:
        assert guesser.guessed <= 4 * 6  # whoever is always wrong is soon asked no more


@pytest.mark.parametrize("kind", ["n-gram", "draft model", "the model itself"])
def test_answers_are_the_same_with_and_without(bf16_model: Decoder, tokenizer: Tokenizer, kind: str) -> None:
    expected = run(make_batcher(bf16_model), requests(tokenizer))
    other = make_bf16_model(tokenizer, layers=1)
    for options in ({}, {"max_cached_tokens": 40}, {"prefix_cache": True, "prefill_chunk": 7}):
        drafters: dict[str, Drafter] = {
            "n-gram": NgramDrafter(),
            "draft model": DraftModel(other, chunk=8),
            "the model itself": DraftModel(bf16_model),
        }
        batcher = make_batcher(bf16_model, drafters[kind], **options)
        assert run(batcher, requests(tokenizer)) == expected


def steps_of(model: Decoder, sequence: Recorded, drafter: Drafter | None) -> int:
    batcher = make_batcher(model, drafter)
    batcher.add(sequence)
    steps = 0
    while not batcher.idle:
        batcher.step()
        steps += 1
    return steps


def test_what_repeats_itself_is_guessed(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    counts = []
    for drafter in (None, NgramDrafter(), DraftModel(bf16_model)):
        sequence = Recorded(tokenizer, [20, 21, 22, 20, 21], max_tokens=24, temperature=0, logit_bias=((22, 100.0),))
        counts.append(steps_of(bf16_model, sequence, drafter))
        assert sequence.generated == [22] * 24
    assert counts[0] == 24
    assert counts[1] <= 8
    # The draft model does not know of the bias: its guesses are wrong and soon it is not asked any more.
    assert counts[2] <= 24
    free = Recorded(tokenizer, [20, 21, 22], max_tokens=24, temperature=0)
    assert steps_of(bf16_model, free, DraftModel(bf16_model)) <= 6


def test_the_newest_match_is_continued_and_goes_round(tokenizer: Tokenizer) -> None:
    drafter = NgramDrafter()
    sequence = Recorded(tokenizer, [1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3], max_tokens=9)
    assert drafter.propose([(sequence, 4)]) == [[5, 6, 1, 2]]
    sequence.tokens += [7, 8, 7, 8]
    assert drafter.propose([(sequence, 5)]) == [[7, 8, 7, 8, 7]]
    sequence.tokens += [30]
    assert drafter.propose([(sequence, 5)]) == [[]]


def test_drafts_stay_within_the_answer_and_the_memory(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    """The last token allowed is never read, and so no draft stands in its place."""
    most = 0
    forward = bf16_model.forward

    def watched(ids_N: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
        nonlocal most
        most = max(most, int(positions_N.max()) + 1)
        return forward(ids_N, positions_N, attend)

    plain = Recorded(tokenizer, [7] * 10, max_tokens=14, temperature=0)
    run(make_batcher(bf16_model), [plain])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16_model, "forward", watched)
        sequence = Recorded(tokenizer, [7] * 10, max_tokens=14, temperature=0)
        run(make_batcher(bf16_model, Guesser({10: [*plain.generated, 1, 1, 1, 1]}, 1.0)), [sequence])
    assert sequence.answer == plain.answer
    assert most == 23


def test_a_constraint_sees_every_token_once_and_in_order(bf16_model: Decoder, tokenizer: Tokenizer) -> None:
    class Alternating:
        """Even and odd tokens in turn."""

        complete = False

        def __init__(self) -> None:
            self.told: list[int] = []

        def mask(self, logits_V: Tensor) -> None:
            logits_V[len(self.told) % 2 :: 2] = -torch.inf

        def commit(self, token: int) -> None:
            self.told.append(token)

    answers = []
    for drafter in (None, NgramDrafter(), DraftModel(bf16_model)):
        constraint = Alternating()
        sequence = Recorded(tokenizer, [8, 9] * 6, max_tokens=12, temperature=0, constraint=constraint)
        answers += run(make_batcher(bf16_model, drafter), [sequence])
        assert constraint.told == sequence.generated
        assert [token % 2 for token in constraint.told] == [1, 0] * 6
    assert answers[0] == answers[1] == answers[2]


def test_a_draft_model_with_another_vocabulary_is_refused(tokenizer: Tokenizer, model: Decoder) -> None:
    with pytest.raises(ModelError, match="draft model has 300"):
        LocalEngine(model, tokenizer, model_id="tiny", draft=make_model(tokenizer, vocabulary_size=300))
