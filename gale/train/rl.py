"""``gale train rl``: a model learns from its own answers, by how good they are.

GRPO (Shao et al. 2024) answers each prompt several times and asks which answers were better than the others; losses
count token by token over the whole batch, so that long answers are not diluted (Yu et al. 2025). PPO (Schulman et al.
2017, Ziegler et al. 2019) trains a critic beside the policy, which says what to expect.

Answers come from the engine over the very module that is trained. Each is seeded by run, step and place, so a resumed
run writes them anew and goes on with the same bits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gale.core import files
from gale.core.device import choose_compute
from gale.core.errors import DataError, GaleError, ModelError
from gale.data.prepare import ready_data
from gale.data.shards import read_manifest
from gale.engine.request import SamplingParams
from gale.engine.rollouts import end_tokens_of, generate
from gale.model.adapter_folder import load_adapter
from gale.model.checkpoint import fingerprint, load_model
from gale.model.config import ModelConfig
from gale.model.lora import add_lora
from gale.model.reward_model import RewardModel, load_reward_model, reward_config
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.advantages import divergence, policy_loss, value_loss
from gale.train.experience import Actor, Experience, answer_values, gather_experience, sample_seed
from gale.train.loop import run
from gale.train.losses import trained_logprobs, with_router_losses
from gale.train.model_folder import check_fits, export_decoder
from gale.train.parallel import World
from gale.train.prompts import PromptSet, prompts_of_split, read_prompts
from gale.train.rewards import Judge, answers_batch, check_same_vocabulary, judge
from gale.train.rl_recipe import RlRecipe
from gale.train.samples import decoder_samples
from gale.train.stage import Loss, Objective, Stage
from gale.train.tuning import adapter_facts, adapter_shape, export_adapter, marker, with_adapters


def rl(recipe: RlRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train ``recipe.base`` on its own answers; see :func:`gale.train.loop.run`."""
    _refuse_company()
    compute = choose_compute(recipe.precision)
    config, tokenizer = ModelConfig.load(recipe.base), Tokenizer.load(recipe.base)
    if recipe.row_tokens > config.context_length:
        raise DataError(f"row_tokens is {recipe.row_tokens}, but {recipe.base} reads {config.context_length} at most.")
    training, held_out, data = _prompts(recipe, config, tokenizer)
    everything = [training, *held_out.values()]
    judging = {"row_tokens": recipe.row_tokens, "rows": recipe.micro_rows}
    reward = judge(recipe.reward, tokenizer, everything, compute, **judging)
    gold = judge(recipe.gold, tokenizer, everything, compute, **judging) if recipe.gold else None
    facts: dict[str, Any] = {
        "base_fingerprint": fingerprint(recipe.base),
        "prompts_fingerprint": _prompts_fingerprint(data, recipe),
        "prompts": len(training.prompts),
        "prompts_too_long": training.left_out,
        "reward": reward.facts,
        "gold": gold.facts if gold else None,
        **adapter_facts(recipe),
    }
    if recipe.critic is not None:
        check_same_vocabulary(recipe.critic, tokenizer)
        if recipe.row_tokens > (most := reward_config(recipe.critic).context_length):
            raise ModelError(f"row_tokens is {recipe.row_tokens}, but the critic {recipe.critic} reads {most} at most.")
        facts["critic_fingerprint"] = fingerprint(recipe.critic)

    def build(dtype: torch.dtype) -> Actor:
        critic = None
        if recipe.algorithm == "ppo":
            if recipe.critic is not None:
                critic = load_reward_model(recipe.critic, dtype=dtype)
            else:
                critic = RewardModel.from_decoder(load_model(recipe.base, dtype=dtype))
            if recipe.lora is not None:
                add_lora(critic, adapter_shape(recipe.lora, recipe.base), seed=recipe.seed)
        return Actor(with_adapters(load_model(recipe.base, dtype=dtype), recipe), critic)

    def export(actor: Actor, folder: Path, dtype: torch.dtype) -> None:
        if recipe.lora is None:
            export_decoder(actor.policy, tokenizer, folder, dtype)
        else:
            export_adapter(actor.policy, tokenizer, folder, dtype, recipe.base)

    chat = "prompt" not in training.prompts[0].source
    samples = decoder_samples(recipe, tokenizer, config.context_length, chat=chat)
    reference = load_model(recipe.base, dtype=compute.dtype, device=compute.device)
    if recipe.lora is not None and recipe.lora.adapter is not None:
        load_adapter(reference, recipe.lora.adapter, base=recipe.base)
    stage = Stage(
        name=recipe.algorithm,
        recipe=recipe,
        data=() if data is None else (data,),
        facts=facts,
        build=build,
        objective=Reinforcement(recipe, reference.requires_grad_(False), training, held_out, reward, gold, tokenizer),
        export=export,
        # Of learning; what the answers and the judges cost comes on top.
        flops_per_token=config.flops_per_token(recipe.row_tokens) * (2 if recipe.algorithm == "ppo" else 1),
        marker=marker(recipe),
        samples=lambda actor, prompts, tokens: samples(actor.policy, prompts, tokens),
    )
    return run(stage, out, resume=resume)


class Reinforcement(Objective[Actor]):
    """The loss of GRPO or PPO over answers that the model itself has just written; items are their tokens."""

    def __init__(
        self,
        recipe: RlRecipe,
        reference: Decoder,
        training: PromptSet,
        held_out: dict[str, PromptSet],
        reward: Judge,
        gold: Judge | None,
        tokenizer: Tokenizer,
    ) -> None:
        self.recipe, self.reference = recipe, reference
        self.training, self.held_out = training, held_out
        self.reward, self.gold = reward, gold
        self._end_tokens = end_tokens_of(tokenizer)
        self._experience: Experience | None = None
        self._order: list[int] = []

    def begin_step(self, model: Actor, step: int) -> dict[str, Any]:
        """Where new answers are due, let the model write them."""
        recipe = self.recipe
        phase, update = divmod(step, recipe.updates_per_rollout)
        if update:
            return {}
        asked = recipe.rollout_rows // recipe.answers_per_prompt
        prompts = [
            self.training.number(phase * asked + place)
            for place in range(asked)
            for _ in range(recipe.answers_per_prompt)
        ]
        self._experience = gather_experience(
            model, self.reference, prompts, step, recipe, self.reward, self.gold, self._end_tokens
        )
        # Which answer each row of the coming steps is: all of them once an epoch, in an order of its own.
        self._order = [
            int(answer)
            for epoch in range(recipe.epochs_per_rollout)
            for answer in np.random.default_rng([recipe.seed, step, epoch]).permutation(len(prompts))
        ]
        return dict(self._experience.figures)

    def loss(self, model: Actor, first_row: int, rows: int) -> Loss:
        """See :meth:`gale.train.stage.Objective.loss`. Answers that teach nothing are not computed at all."""
        recipe, known = self.recipe, self._known()
        chosen = [answer for answer in self._answers(first_row, rows) if known.kept_R[answer]]
        if not chosen:
            return Loss(torch.zeros((), requires_grad=True), 0, 0)
        batch, places_T = answers_batch([known.answers[answer] for answer in chosen]), known.places(chosen)
        logprobs_T = trained_logprobs(model.policy, batch)
        losses_T, clipped_T = policy_loss(
            logprobs_T,
            known.logprobs_A[places_T],
            known.advantages_A[places_T],
            clip_low=recipe.clip_low,
            clip_high=recipe.clip_high,
        )
        total, routers = with_router_losses(losses_T.sum(), model.policy, len(places_T))
        sums = {"clip_fraction": float(clipped_T.sum()), **routers}
        if recipe.kl_coefficient and not recipe.kl_in_reward:
            total = total + recipe.kl_coefficient * divergence(logprobs_T, known.reference_A[places_T]).sum()
        if model.critic is not None:
            assert known.values_A is not None and known.returns_A is not None, "a critic has given its opinion"
            errors_T = value_loss(
                answer_values(model.critic, batch),
                known.values_A[places_T],
                known.returns_A[places_T],
                clip=recipe.value_clip,
            )
            total, _ = with_router_losses(total, model.critic.trunk, len(places_T))
            total = total + recipe.value_coefficient * errors_T.sum()
            sums["value_loss"] = float(errors_T.detach().sum())
        return Loss(total, len(places_T), len(batch.ids_N), sums)

    def describe(self, first_row: int, rows: int) -> str:
        """The prompts of these rows."""
        known = self._known()
        names = dict.fromkeys(known.prompts[answer].name for answer in self._answers(first_row, rows))
        return f"answers to {', '.join(names)}"

    def evaluate(self, model: Actor, world: World) -> dict[str, float]:
        """Mean reward (and gold reward) of answers to the first held-out prompts, drawn alike every time."""
        recipe = self.recipe
        figures: dict[str, float] = {}
        for name, several in self.held_out.items():
            prompts = several.prompts[: recipe.evaluate_rows]
            sampling = [
                SamplingParams(
                    max_tokens=recipe.answer_tokens,
                    temperature=recipe.evaluate_temperature,
                    seed=sample_seed(recipe.seed, recipe.steps, sample),
                )
                for sample in range(len(prompts))
            ]
            answers = generate(model.policy, [prompt.ids for prompt in prompts], sampling, end_tokens=self._end_tokens)
            figures[f"{name}_reward"] = float(np.mean(self.reward(prompts, answers)))
            if self.gold is not None:
                figures[f"{name}_gold"] = float(np.mean(self.gold(prompts, answers)))
        return figures

    def _answers(self, first_row: int, rows: int) -> list[int]:
        first = first_row % (self.recipe.batch_rows * self.recipe.updates_per_rollout)
        return self._order[first : first + rows]

    def _known(self) -> Experience:
        assert self._experience is not None, "a step begins with answers"
        return self._experience


def _prompts(
    recipe: RlRecipe, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[PromptSet, dict[str, PromptSet], Path | None]:
    """Prompts to train on, held-out ones by name, and the folder of prepared data if that is where they come from."""
    fitting = {"most_tokens": recipe.row_tokens - recipe.answer_tokens, "seed": recipe.seed}
    held_out: dict[str, PromptSet] = {}
    data = None
    if recipe.data.suffix == ".jsonl":
        training = read_prompts(recipe.data, tokenizer, **fitting)
    else:
        data = ready_data(recipe.data)
        check_fits(recipe.base, config, data, recipe.row_tokens)
        splits = read_manifest(data)["splits"]
        training = prompts_of_split(data, "train", tokenizer, **fitting)
        held_out = {name: prompts_of_split(data, name, tokenizer, **fitting) for name in splits if name != "train"}
    if recipe.held_out is not None:
        held_out[recipe.held_out.stem] = read_prompts(recipe.held_out, tokenizer, **fitting)
    return training, held_out, data


def _prompts_fingerprint(data: Path | None, recipe: RlRecipe) -> str:
    if data is not None:
        return str(read_manifest(data)["fingerprint"])
    return files.sha256(recipe.data)


def _refuse_company() -> None:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)
    if several:
        raise GaleError(
            "Reinforcement learning runs in one process: the engine that writes the answers is not spread out.",
            hint="Start it without torchrun, on one device.",
        )
