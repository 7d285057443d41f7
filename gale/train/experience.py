"""What a policy has just done, and what is to be learnt from it: answers, rewards, and the figures beside each token.

Shape suffixes: R answers, A all their tokens one after another, T tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gale.engine.request import SamplingParams
from gale.engine.rollouts import Rollout, generate
from gale.model.reward_model import RewardModel
from gale.model.transformer import Decoder
from gale.train.advantages import generalised_advantages, group_advantages, whitened
from gale.train.batches import IGNORED, Batch
from gale.train.losses import token_values, trained_logprobs
from gale.train.prompts import Prompt
from gale.train.rewards import Judge, answers_batch
from gale.train.rl_recipe import RlRecipe


class Actor(nn.Module):
    """What is trained: the policy, and with PPO the critic beside it."""

    def __init__(self, policy: Decoder, critic: RewardModel | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic


@dataclass(frozen=True, slots=True)
class Experience:
    """Answers with the figures of their tokens before anything was learnt from them; fp32, on the model's device.

    ``first_R`` is where each answer's tokens begin among all, ``kept_R`` whether it teaches anything. ``values_A`` and
    ``returns_A`` are there with a critic only. ``figures`` are for the log.
    """

    prompts: list[Prompt]
    answers: list[Rollout]
    kept_R: list[bool]
    first_R: list[int]
    logprobs_A: Tensor
    reference_A: Tensor
    advantages_A: Tensor
    values_A: Tensor | None
    returns_A: Tensor | None
    figures: dict[str, float]

    def places(self, answers: list[int]) -> Tensor:
        """Where the tokens of these answers stand among all."""
        return torch.cat(
            [torch.arange(self.first_R[a], self.first_R[a] + len(self.answers[a].tokens)) for a in answers]
        ).to(self.logprobs_A.device)


def sample_seed(seed: int, step: int, sample: int) -> int:
    """The seed of one answer: independent of all others, and the same in a resumed run."""
    return int(np.random.SeedSequence((seed, step, sample)).generate_state(1, np.uint64)[0])


def gather_experience(
    actor: Actor,
    reference: Decoder,
    prompts: list[Prompt],
    step: int,
    recipe: RlRecipe,
    reward: Judge,
    gold: Judge | None,
    end_tokens: frozenset[int],
) -> Experience:
    """Let the policy answer ``prompts``, ask the judges, and work out what each token is worth.

    The prompts of a group stand one after another. Answers are drawn from the policy as it is (temperature 1), so that
    ratios to it mean something.
    """
    sampling = [
        SamplingParams(max_tokens=recipe.answer_tokens, seed=sample_seed(recipe.seed, step, sample), logprobs=0)
        for sample in range(len(prompts))
    ]
    answers = generate(actor.policy, [prompt.ids for prompt in prompts], sampling, end_tokens=end_tokens)
    lengths_R = torch.tensor([len(answer.tokens) for answer in answers])
    finished_R = torch.tensor([answer.reason == "stop" for answer in answers])
    judged_R = torch.tensor(reward(prompts, answers), dtype=torch.float64)
    if recipe.unfinished_reward is not None:
        judged_R = torch.where(finished_R, judged_R, recipe.unfinished_reward)

    actor.eval()
    with torch.no_grad():
        logprobs_A = _in_pieces(answers, recipe.micro_rows, lambda batch: trained_logprobs(actor.policy, batch))
        reference_A = _in_pieces(answers, recipe.micro_rows, lambda batch: trained_logprobs(reference, batch))
        values_A = None
        if (critic := actor.critic) is not None:
            values_A = _in_pieces(answers, recipe.micro_rows, lambda batch: answer_values(critic, batch))
    actor.train()

    gap_RT = _by_answer(logprobs_A - reference_A, lengths_R)
    engine_A = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
    figures = {
        "reward": float(judged_R.mean()),
        "reward_std": float(judged_R.std(correction=0)),
        "kl": float(gap_RT.sum(1).mean()),
        "entropy": -float(logprobs_A.mean()),
        "answer_tokens": float(lengths_R.double().mean()),
        "finished": float(finished_R.double().mean()),
        "engine_gap": float((engine_A - logprobs_A.cpu()).abs().mean()),
    }
    if gold is not None:
        figures["gold"] = float(np.mean(gold(prompts, answers)))

    # What each token is worth.
    price = recipe.kl_coefficient if recipe.kl_in_reward else 0.0
    kept_R, returns_A = torch.ones(len(answers), dtype=torch.bool), None
    if values_A is None:
        advantages_R, kept_R = group_advantages(
            judged_R - price * gap_RT.sum(1),
            recipe.answers_per_prompt,
            by_deviation=recipe.normalise_by_deviation,
            least_spread=recipe.least_spread,
        )
        advantages_A = advantages_R.repeat_interleave(lengths_R)
        figures["dropped_groups"] = 1 - float(kept_R.double().mean())
    else:
        rewards_RT, values_RT = -price * gap_RT, _by_answer(values_A, lengths_R)
        rewards_RT[torch.arange(len(answers)), lengths_R - 1] += judged_R
        advantages_RT = generalised_advantages(
            rewards_RT, values_RT, lengths_R, gamma=recipe.gamma, decay=recipe.gae_decay
        )
        valid_RT = torch.arange(advantages_RT.shape[1]) < lengths_R[:, None]
        returns_A = advantages_RT[valid_RT].to(values_A.device) + values_A
        advantages_A = whitened(advantages_RT[valid_RT])
    return Experience(
        prompts=prompts,
        answers=answers,
        kept_R=kept_R.tolist(),
        first_R=(lengths_R.cumsum(0) - lengths_R).tolist(),
        logprobs_A=logprobs_A,
        reference_A=reference_A,
        advantages_A=advantages_A.to(logprobs_A.device),
        values_A=values_A,
        returns_A=returns_A,
        figures=figures,
    )


def answer_values(critic: RewardModel, batch: Batch) -> Tensor:
    """What the critic expects before each of the answers' tokens, [T]; fp32 and differentiable."""
    values_N = token_values(critic, batch)
    return values_N[(batch.targets_N != IGNORED).to(values_N.device)]


def _in_pieces(answers: list[Rollout], rows: int, measure: Callable[[Batch], Tensor]) -> Tensor:
    return torch.cat([measure(answers_batch(answers[low : low + rows])) for low in range(0, len(answers), rows)])


def _by_answer(values_A: Tensor, lengths_R: Tensor) -> Tensor:
    """[A] to [R, T], in fp64, with zeros after each answer's end."""
    valid_RT = torch.arange(int(lengths_R.max())) < lengths_R[:, None]
    values_RT = torch.zeros(valid_RT.shape, dtype=torch.float64)
    values_RT[valid_RT] = values_A.double().cpu()
    return values_RT
