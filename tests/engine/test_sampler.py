"""Sampling: greedy, nucleus, seeds, and numbers at the edges."""

from __future__ import annotations

from collections import Counter

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
    asked = [SamplingParams(temperature=t, top_p=p, seed=5) for t in (0.0, 0.7, 1e-40) for p in (1.0, 0.9, 0.3)]
    alone = [draw(Sampler(params), row) for params, row in zip(asked, logits, strict=True)]
    assert choose([Sampler(params) for params in asked], logits) == alone
