"""``gale train best-of-n``: of several answers to each prompt the best one is kept, as data for supervised fine-tuning.

Also called rejection sampling; fine-tuning on what it keeps, again and again, is expert iteration (Anthony et al.
2017). How far the best of n lies from the model that wrote them is known exactly (Stiennon et al. 2020, Gao et al.
2023), which makes it the yardstick for policies that were optimised.

Shape suffixes: P prompts, S answers to each.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gale.core import files
from gale.core.device import Precision, choose_compute
from gale.core.errors import DataError
from gale.core.progress import Bar
from gale.core.recipe import Recipe
from gale.engine.request import SamplingParams
from gale.engine.rollouts import end_tokens_of, generate
from gale.model.checkpoint import load_model
from gale.text.tokenizer import Tokenizer
from gale.train.experience import sample_seed
from gale.train.prompts import Prompt, read_prompts
from gale.train.rewards import judge
from gale.train.rl_recipe import Reward

SUMMARY = "summary.json"


class BestOfNRecipe(Recipe):
    """``gale train best-of-n``."""

    data: Path = Field(description="Prompts: JSON lines of {prompt} or {messages}, with {expected} for a verifier.")
    base: Path = Field(description="Model folder that answers.")
    reward: Reward
    gold: Reward | None = Field(default=None, description="Another judge, whose opinion is reported.")
    n: int = Field(ge=1, description="Answers to each prompt.")
    answer_tokens: int = Field(ge=1, description="Longest answer.")
    least_reward: float | None = Field(default=None, description="Keep no answer that is worse than this.")
    at_once: int = Field(default=256, ge=1, description="Prompts that are answered and judged together.")
    seed: int = Field(default=0, ge=0)
    precision: Precision = "auto"


def best_of_n(recipe: BestOfNRecipe, out: Path) -> dict[str, Any]:
    """Write ``best.jsonl``, rows of the data formats chat or text, and ``summary.json``, which is returned.

    The summary has, for n = 1, 2, 4, ... up to ``n``, the mean reward of the best of n and their distance from the
    base model in nats. Raises what :func:`gale.train.rl.rl` does of its input.
    """
    compute = choose_compute(recipe.precision)
    tokenizer = Tokenizer.load(recipe.base)
    model = load_model(recipe.base, dtype=compute.dtype, device=compute.device)
    context = model.config.context_length
    prompts = read_prompts(recipe.data, tokenizer, most_tokens=context - recipe.answer_tokens, seed=recipe.seed)
    longest = max(len(prompt.ids) for prompt in prompts.prompts) + recipe.answer_tokens
    judging = {"row_tokens": longest, "rows": 64}
    reward = judge(recipe.reward, tokenizer, [prompts], compute, **judging)
    gold = judge(recipe.gold, tokenizer, [prompts], compute, **judging) if recipe.gold else None
    rewards: list[list[float]] = []
    golds: list[list[float]] = []
    rows: list[dict[str, Any]] = []
    with files.new_directory(out, marker=SUMMARY) as folder, Bar("Best of n", len(prompts.prompts)) as bar:
        for low in range(0, len(prompts.prompts), recipe.at_once):
            several = prompts.prompts[low : low + recipe.at_once]
            asked = [prompt for prompt in several for _ in range(recipe.n)]
            sampling = [
                SamplingParams(max_tokens=recipe.answer_tokens, seed=sample_seed(recipe.seed, low, sample))
                for sample in range(len(asked))
            ]
            answers = generate(model, [p.ids for p in asked], sampling, end_tokens=end_tokens_of(tokenizer))
            found = torch.tensor(reward(asked, answers)).view(-1, recipe.n)
            rewards += found.tolist()
            if gold is not None:
                golds += torch.tensor(gold(asked, answers)).view(-1, recipe.n).tolist()
            for place, best in enumerate(found.argmax(1).tolist()):
                if recipe.least_reward is None or float(found[place, best]) >= recipe.least_reward:
                    text = tokenizer.decode(answers[place * recipe.n + best].tokens)
                    rows.append(_as_data(several[place], text, float(found[place, best])))
            bar.advance(steps=len(several))
        if not rows:
            raise DataError("No answer was good enough.", hint="Lower least_reward, or raise n.")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(folder / "best.jsonl", "".join(lines))
        curve = _curve(torch.tensor(rewards), torch.tensor(golds) if gold else None)
        counts = {"prompts": len(rewards), "too_long": prompts.left_out, "kept": len(rows)}
        summary: dict[str, Any] = {**counts, "best_of": curve}
        files.write_json(folder / SUMMARY, summary)
    return summary


def best_of_n_divergence(n: int) -> float:
    """KL, in nats, from a model to the best of ``n`` of its answers, where no two are equally good."""
    return math.log(n) - (n - 1) / n


def expected_best(rewards_PS: Tensor, values_PS: Tensor, n: int) -> Tensor:
    """What ``values`` is on average where ``rewards`` is highest among ``n`` of a prompt's answers: [P], fp64.

    The mean over all ways to draw n of the S answers, not one draw (Nakano et al. 2021).
    """
    samples = rewards_PS.shape[1]
    order_PS = rewards_PS.argsort(dim=1, stable=True)
    sorted_PS = values_PS.double().gather(1, order_PS)
    ways = math.comb(samples, n)
    # The answer of rank i is the best of n where the other n - 1 are among the i below it.
    weight_S = torch.tensor([math.comb(rank, n - 1) / ways for rank in range(samples)], dtype=torch.float64)
    return sorted_PS @ weight_S


def _curve(rewards_PS: Tensor, golds_PS: Tensor | None) -> list[dict[str, float]]:
    curve: list[dict[str, float]] = []
    n = 1
    while n <= rewards_PS.shape[1]:
        point = {
            "n": n,
            "kl": best_of_n_divergence(n),
            "reward": float(expected_best(rewards_PS, rewards_PS, n).mean()),
        }
        if golds_PS is not None:
            point["gold"] = float(expected_best(rewards_PS, golds_PS, n).mean())
        curve.append(point)
        n *= 2
    return curve


def _as_data(prompt: Prompt, answer: str, reward: float) -> dict[str, Any]:
    """A row for `gale data prepare`, of the format chat or text."""
    if "messages" in prompt.source:
        messages = [*prompt.source["messages"], {"role": "assistant", "content": answer}]
        return {"messages": messages, "reward": reward}
    return {"text": prompt.source["prompt"] + answer, "reward": reward}
