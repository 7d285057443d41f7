"""The arithmetic of GRPO and PPO against what their papers write down, spelled out in fp64."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from gale.train.advantages import (
    divergence,
    generalised_advantages,
    group_advantages,
    policy_loss,
    value_loss,
    whitened,
)
from gale.train.best_of_n import best_of_n_divergence, expected_best


def test_an_answer_is_measured_against_its_own_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 7.0, 5.0, 7.0])
    plain, kept = group_advantages(rewards, 4, by_deviation=False, least_spread=1e-4)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, -1.0, 1.0, -1.0, 1.0]
    assert kept.all()
    scaled, _ = group_advantages(rewards, 4, by_deviation=True, least_spread=1e-4)
    deviation = math.sqrt((0.75**2 + 3 * 0.25**2) / 4)
    expected = [0.75 / deviation, *[-0.25 / deviation] * 3, -1, 1, -1, 1]
    assert scaled.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_group_without_a_difference_teaches_nothing() -> None:
    rewards = torch.tensor([2.0, 2.0 + 1e-6, 1.0, 2.0])
    advantages, kept = group_advantages(rewards, 2, by_deviation=True, least_spread=1e-4)
    assert kept.tolist() == [False, False, True, True]
    assert advantages.isfinite().all()


@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.95, 0.0)])
def test_generalised_advantages_are_the_papers_sums(gamma: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 3, 7, generator=generator).unbind(0)
    lengths = torch.tensor([7, 1, 4])
    found = generalised_advantages(rewards, values, lengths, gamma=gamma, decay=decay)
    for row, length in enumerate(lengths.tolist()):
        r, v = rewards[row].tolist(), [*values[row].tolist()[:length], 0.0]
        for t in range(7):
            surprises = [r[s] + gamma * v[s + 1] - v[s] for s in range(t, length)]
            expected = sum((gamma * decay) ** k * surprise for k, surprise in enumerate(surprises))
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-6)


def test_whitened_numbers_have_mean_0_and_variance_1() -> None:
    numbers = whitened(torch.tensor([3.0, 5.0, 11.0, 5.0]))
    assert float(numbers.mean()) == pytest.approx(0, abs=1e-7)
    assert float(numbers.square().mean()) == pytest.approx(1, rel=1e-6)
    assert whitened(torch.tensor([2.0, 2.0])).tolist() == [0, 0]


def test_the_clip_holds_back_only_what_has_gone_far_enough() -> None:
    ratios = [0.5, 0.9, 1.0, 1.1, 2.0]
    for advantage in (1.5, -1.5):
        new = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
        advantages = torch.full((5,), advantage, dtype=torch.float64)
        losses, clipped = policy_loss(new, torch.zeros(5), advantages, clip_low=0.2, clip_high=0.3)
        expected = [-min(r * advantage, min(max(r, 0.8), 1.3) * advantage) for r in ratios]
        assert losses.tolist() == pytest.approx(expected)
        losses.sum().backward()
        held = [(advantage < 0 and r < 0.8) or (advantage > 0 and r > 1.3) for r in ratios]
        assert clipped.tolist() == held
        assert new.grad is not None
        assert (new.grad == 0).tolist() == held


def test_at_the_policy_itself_the_gradient_is_reinforce() -> None:
    logprobs = torch.tensor([-0.3, -2.0], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    losses, _ = policy_loss(logprobs, logprobs.detach().clone(), advantages, clip_low=0.2, clip_high=0.2)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-2.0, 1.0]


def test_a_value_gains_nothing_beyond_its_clip() -> None:
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.6, 0.6], requires_grad=True)
    losses = value_loss(values, old, returns, clip=0.2)
    assert losses.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 1.6**2])
    losses.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.6])


def test_the_divergence_estimate_is_unbiased_and_never_negative() -> None:
    p, q = (torch.softmax(torch.tensor(x, dtype=torch.float64), 0) for x in ([1.0, 0.0, -2.0], [0.0, 0.5, -1.0]))
    estimates = divergence(p.log(), q.log())
    assert (estimates >= 0).all()
    assert float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)
    at_home = q.log().requires_grad_()
    value = divergence(at_home, q.log()).sum()
    value.backward()
    assert value.item() == 0
    assert at_home.grad is not None
    assert at_home.grad.abs().max() == 0


def test_the_best_of_n_is_the_mean_over_all_ways_to_draw_n() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, golds = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64).unbind(0)
    for n in (1, 2, 5, 6):
        for row in range(3):
            drawn = list(combinations(range(6), n))
            best = [max(places, key=lambda place: float(rewards[row, place])) for places in drawn]
            expected = sum(float(golds[row, place]) for place in best) / len(drawn)
            assert float(expected_best(rewards, golds, n)[row]) == pytest.approx(expected, rel=1e-9)
    assert best_of_n_divergence(1) == 0
    assert best_of_n_divergence(8) == pytest.approx(math.log(8) - 7 / 8)
