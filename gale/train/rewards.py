"""Judges: how good answers are, by a reward model or by a program, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gale.core.device import Compute
from gale.core.errors import DataError, ModelError, RecipeError
from gale.data.verifiers import VERIFIERS, VerifierOptions, verify
from gale.engine.rollouts import Rollout
from gale.model.checkpoint import fingerprint
from gale.model.reward_model import RewardModel, load_reward_model
from gale.text.tokenizer import Tokenizer
from gale.train.batches import IGNORED, Batch
from gale.train.losses import token_values
from gale.train.model_folder import differing_tokens
from gale.train.prompts import Prompt, PromptSet
from gale.train.rl_recipe import Reward


class Judge(Protocol):
    """Says how good answers are; more is better."""

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be judged by the same judge."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Rollout]) -> list[float]:
        """The reward of each answer to its prompt."""


def judge(
    reward: Reward, tokenizer: Tokenizer, prompts: Sequence[PromptSet], compute: Compute, *, row_tokens: int, rows: int
) -> Judge:
    """The judge of a recipe, for answers written with ``tokenizer`` to ``prompts``; it reads ``rows`` answers at once.

    Raises :class:`RecipeError` where there is no such verifier, :class:`DataError` where prompts lack what it expects,
    and :class:`ModelError` where a reward model reads another vocabulary or less than ``row_tokens``.
    """
    if reward.verifier is not None:
        if reward.verifier not in VERIFIERS:
            raise RecipeError(
                f"There is no verifier {reward.verifier!r}; there are {', '.join(sorted(VERIFIERS))}.", []
            )
        if lacking := [p.name for several in prompts for p in several.prompts if p.expected is None]:
            raise DataError(
                f"{len(lacking)} prompts say nothing about what the verifier is to expect; the first is {lacking[0]}.",
                hint='Add "expected" to each row.',
            )
        return VerifierJudge(reward.verifier, reward.options, tokenizer)
    assert reward.model is not None, "the recipe asks for one of the two"
    return ModelJudge.load(reward.model, tokenizer, compute, row_tokens=row_tokens, rows=rows)


@dataclass(frozen=True, slots=True)
class VerifierJudge:
    """A program of :mod:`gale.data.verifiers`."""

    verifier: str
    options: VerifierOptions
    tokenizer: Tokenizer

    @property
    def facts(self) -> dict[str, Any]:
        """Its name and options."""
        return {"verifier": self.verifier, "options": self.options.model_dump(mode="json")}

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Rollout]) -> list[float]:
        return [
            verify(self.verifier, self.tokenizer.decode(answer.tokens), prompt.expected or "", self.options)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ModelJudge:
    """A reward model: its value at an answer's last token (Stiennon et al. 2020)."""

    model: RewardModel
    fingerprint: str
    rows: int

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, compute: Compute, *, row_tokens: int, rows: int) -> ModelJudge:
        """Open a reward model's folder; see :func:`judge`."""
        model = load_reward_model(folder, dtype=compute.dtype, device=compute.device)
        check_same_vocabulary(folder, tokenizer)
        if row_tokens > model.config.context_length:
            raise ModelError(
                f"A prompt with its answer may have {row_tokens} tokens, but the reward model {folder} reads "
                f"{model.config.context_length} at most."
            )
        return cls(model.requires_grad_(False), fingerprint(folder), rows)

    @property
    def facts(self) -> dict[str, Any]:
        """The weights' digest."""
        return {"model": self.fingerprint}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Rollout]) -> list[float]:
        rewards: list[float] = []
        for low in range(0, len(answers), self.rows):
            batch = answers_batch(answers[low : low + self.rows])
            values_N = token_values(self.model, batch)
            rewards += values_N[torch.tensor(batch.lengths, device=values_N.device).cumsum(0) - 1].tolist()
        return rewards


def answers_batch(answers: Sequence[Rollout]) -> Batch:
    """Prompts with their answers, a piece each; what is predicted are the answers' tokens."""
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    for answer in answers:
        ids += [*answer.prompt, *answer.tokens]
        targets += [IGNORED] * (len(answer.prompt) - 1) + [*answer.tokens, IGNORED]
        lengths.append(len(answer.prompt) + len(answer.tokens))
        positions += range(lengths[-1])
    return Batch(torch.tensor(ids), torch.tensor(targets), torch.tensor(positions), lengths)


def check_same_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise :class:`ModelError` unless a reward model reads the very tokens that the policy writes."""
    if differing := differing_tokens(Tokenizer.load(folder), tokenizer):
        raise ModelError(
            f"The reward model {folder} has another vocabulary than the model that is trained: they {differing}.",
            hint="Train it from the same base model.",
        )
