"""The arithmetic of policy optimisation: advantages, and what is minimised given them.

GRPO (Shao et al. 2024) compares the answers to one prompt with one another; PPO (Schulman et al. 2017) compares each
token with what a critic expected (GAE, Schulman et al. 2016).

Shape suffixes: R answers, T tokens (of one answer where it stands beside R, of all of them where it does not).
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-8


def group_advantages(
    rewards_R: Tensor, answers: int, *, by_deviation: bool, least_spread: float
) -> tuple[Tensor, Tensor]:
    """Each answer's reward above the mean of its group of ``answers``; [R], and which answers teach anything, [R].

    ``by_deviation`` divides by the group's standard deviation, as GRPO does; without it hard and easy prompts weigh
    what their rewards say (Liu et al. 2025, "Dr. GRPO"). A group whose rewards lie within ``least_spread`` of one
    another has nothing to compare (Yu et al. 2025, "DAPO", leave such out); numbers closer than that are rounding.
    """
    rewards_GA = rewards_R.double().view(-1, answers)
    advantages_GA = rewards_GA - rewards_GA.mean(1, keepdim=True)
    if by_deviation:
        advantages_GA /= rewards_GA.std(1, correction=0, keepdim=True) + _TINY
    told_apart_G = rewards_GA.amax(1) - rewards_GA.amin(1) > least_spread
    return advantages_GA.flatten().float(), told_apart_G.repeat_interleave(answers)


def generalised_advantages(
    rewards_RT: Tensor, values_RT: Tensor, lengths_R: Tensor, *, gamma: float, decay: float
) -> Tensor:
    """GAE: [R, T] with zeros after each answer's end, beyond which nothing is expected any more.

    ``values_RT`` is what the critic expects before each token, ``rewards_RT`` what came with the token. The answer's
    return, which the critic learns, is the advantage plus the value.
    """
    valid_RT = torch.arange(rewards_RT.shape[1], device=rewards_RT.device) < lengths_R[:, None]
    rewards_RT, values_RT = (torch.where(valid_RT, x.double(), 0.0) for x in (rewards_RT, values_RT))
    following_RT = torch.cat([values_RT[:, 1:], torch.zeros_like(values_RT[:, :1])], dim=1)
    surprises_RT = rewards_RT + gamma * following_RT - values_RT
    advantages_RT = torch.zeros_like(surprises_RT)
    later_R = torch.zeros_like(surprises_RT[:, 0])
    for place in reversed(range(surprises_RT.shape[1])):
        later_R = surprises_RT[:, place] + gamma * decay * later_R
        advantages_RT[:, place] = later_R
    return torch.where(valid_RT, advantages_RT, 0.0).float()


def whitened(values_T: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and variance 1."""
    wide_T = values_T.double()
    return ((wide_T - wide_T.mean()) / (wide_T.std(correction=0) + _TINY)).float()


def policy_loss(
    logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate [T], to be minimised, and where the clip took the gradient away, [T].

    Ratios to the ``old`` policy, which wrote the answers, count between ``1 - clip_low`` and ``1 + clip_high``.
    """
    ratios_T = torch.exp(logprobs_T - old_T)
    free_T = -advantages_T * ratios_T
    held_T = -advantages_T * ratios_T.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free_T, held_T), (held_T > free_T).detach()


def value_loss(values_T: Tensor, old_T: Tensor, returns_T: Tensor, *, clip: float) -> Tensor:
    """Half the squared error [T] of the critic; a step further than ``clip`` from its ``old`` values gains nothing."""
    held_T = old_T + (values_T - old_T).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_T - returns_T).square(), (held_T - returns_T).square())


def divergence(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Schulman's k3 estimate [T] of KL(policy || reference) from the policy's own samples.

    Unbiased, never negative, and zero with zero gradient where the two agree.
    """
    gap_T = reference_T - logprobs_T
    return torch.exp(gap_T) - gap_T - 1
