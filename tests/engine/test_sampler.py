"""Sampling: greedy, what top-k, top-p and min-p leave, penalties, seeds, and numbers at the edges."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch

from gale.engine.request import SamplingParams
from gale.engine.sampler import Sampler, choose


def draw(sampler: Sampler, logits_V: torch.Tensor) -> int:
    [token] = choose([sampler], logits_V[None])
    return token


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert draw(Sampler(SamplingParams(temperature=0)), torch.tensor([0.1, 2.0, 1.9])) == 1


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    sampler = Sampler(SamplingParams(temperature=1e-40, seed=1))
    assert [draw(sampler, torch.tensor([-900.0, 900.0, 899.0])) for _ in range(5)] == [1] * 5


@pytest.mark.parametrize("size", [5, 1000], ids=["short list", "whole vocabulary"])
def test_top_p_keeps_the_smallest_set_that_reaches_it(size: int) -> None:
    # Probabilities 0.5, 0.3, and the rest alike: 0.6 needs the first two.
    rest = torch.full((size - 2,), 0.2 / (size - 2))
    logits = torch.cat([torch.tensor([0.5, 0.3]), rest]).log()
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.6, seed=3))
    drawn = Counter(draw(sampler, logits) for _ in range(400))
    assert set(drawn) == {0, 1}
    assert drawn[0] > drawn[1]


def test_top_p_beyond_the_short_list_still_holds() -> None:
    logits = torch.zeros(2000)
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.5, seed=3))
    drawn = {draw(sampler, logits) for _ in range(1500)}
    assert 256 < len(drawn) <= 1000


def test_a_tiny_top_p_still_leaves_one_token() -> None:
    sampler = Sampler(SamplingParams(temperature=1, top_p=1e-12, seed=3))
    assert {draw(sampler, torch.tensor([0.0, 3.0, 1.0])) for _ in range(20)} == {1}


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=1, seed=11))
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    drawn = Counter(draw(sampler, logits) for _ in range(4000))
    assert abs(drawn[0] / 4000 - 0.7) < 0.03
    assert abs(drawn[2] / 4000 - 0.1) < 0.03


@pytest.mark.parametrize("size", [7, 1000])
def test_a_token_does_not_depend_on_the_rows_beside_it(size: int) -> None:
    logits = torch.randn(9, size, generator=torch.Generator().manual_seed(0))
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 3, "repetition_penalty": 2.0}]
    asked = [SamplingParams(temperature=t, seed=5, **kind) for t in (0.0, 0.7, 1e-40) for kind in kinds]
    alone = [draw(Sampler(params), row) for params, row in zip(asked, logits, strict=True)]
    assert choose([Sampler(params) for params in asked], logits) == alone


class Swept(Sampler):
    """Draws a number that is given, instead of a random one."""

    def __init__(self, params: SamplingParams, number: float) -> None:
        super().__init__(params)
        self._number = number

    def draw(self) -> float:
        return self._number


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300},
        {"top_k": 10**9},
        {"min_p": 0.2},
        {"min_p": 1e-6},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7},
        {"top_k": 300, "top_p": 0.99},
        {"top_p": 0.9, "min_p": 0.05},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "steep"])
def test_tokens_are_as_frequent_as_transformers_filters_say(filters: dict[str, Any], spread: float) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(500, generator=torch.Generator().manual_seed(2)) * spread
    scores = TemperatureLogitsWarper(0.7)(torch.tensor([[0]]), logits[None])
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in filters:
            scores = warper(filters[name])(torch.tensor([[0]]), scores)
    numbers = 3000
    params = SamplingParams(temperature=0.7, **filters)
    swept = [Swept(params, (place + 0.5) / numbers) for place in range(numbers)]
    counts = torch.bincount(torch.tensor(choose(swept, logits.expand(numbers, -1))), minlength=500)
    # Evenly spaced numbers meet each token as often as its probability says, give or take one.
    assert ((counts / numbers - torch.softmax(scores[0], -1)).abs() <= 1.01 / numbers).all()
    assert not counts[scores[0] == -torch.inf].any()


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, answer = [3, 3, 8, 0, 41], [5, 8, 5, 17, *range(20, 200)]
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for penalty in (1.3, 0.7):
        sampler = Sampler(SamplingParams(repetition_penalty=penalty), prompt)
        for count in range(len(answer)):
            changed = logits.clone()
            sampler.edit(changed)
            ids = torch.tensor([prompt + answer[:count]])
            assert torch.equal(changed, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0])
            sampler.commit(answer[count])


def test_frequency_and_presence_penalties_count_the_answer_as_openai_defines_them() -> None:
    sampler = Sampler(SamplingParams(frequency_penalty=0.5, presence_penalty=0.25), prompt=[1, 2])
    for token in (4, 6, 4, 4):
        sampler.commit(token)
    changed = torch.zeros(8)
    sampler.edit(changed)
    assert changed.tolist() == [0, 0, 0, 0, -1.75, 0, -0.75, 0]


def test_a_bias_is_added_and_forces_or_bans_a_token() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    for bias, token in ((((1, -100.0),), 3), (((0, 100.0),), 0), (((1, -2.0), (2, 1.5)), 2)):
        assert draw(Sampler(SamplingParams(temperature=0, logit_bias=bias)), logits) == token
    assert logits.tolist() == [0, 3, 1, 2]  # the scores themselves, for those who asked for them, are as they were


def test_all_changes_come_in_the_stated_order() -> None:
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0, logit_bias=((0, 3.0), (1, -3.0)))
    sampler = Sampler(params, prompt=[0])
    sampler.commit(1)
    changed = torch.tensor([1.0, 1.0, 1.0])
    sampler.edit(changed)
    assert changed.tolist() == [(1 + 3) / 2, (1 - 3) * 2 - 1, 1]


def test_a_constraint_is_masked_last_and_told_what_was_chosen() -> None:
    class Only:
        told: ClassVar[list[int]] = []

        def mask(self, logits_V: torch.Tensor) -> None:
            logits_V[:2] = -torch.inf

        def commit(self, token: int) -> None:
            self.told.append(token)

    sampler = Sampler(SamplingParams(temperature=0, logit_bias=((0, 100.0),)), constraint=Only())
    assert draw(sampler, torch.tensor([5.0, 4.0, 1.0, 2.0])) == 3
    sampler.commit(3)
    assert Only.told == [3]
