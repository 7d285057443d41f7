"""The recipe of ``gale train rl``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from gale.core.recipe import Recipe
from gale.data.verifiers import VerifierOptions
from gale.train.recipe import Optimiser, TuningRecipe

_OF_GRPO = ("normalise_by_deviation", "least_spread")
_OF_PPO = ("gamma", "gae_decay", "value_clip", "value_coefficient", "critic")


class Reward(Recipe):
    """How good an answer is: what a reward model says, or what a program finds."""

    model: Path | None = Field(default=None, description="Folder made by `gale train reward`.")
    verifier: str | None = Field(default=None, description="exact, contains, number, regex, choice or f1.")
    options: VerifierOptions = Field(default=VerifierOptions(), description="For the verifier.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Reward:
        if (self.model is None) == (self.verifier is None):
            raise ValueError("give either model, a reward model's folder, or verifier, a program's name")
        return self


class RlOptimiser(Optimiser):
    """As for other stages, but for what rewards change."""

    spike_factor: float = Field(
        default=0.0, ge=0, description="As elsewhere, but off: how much there is to learn changes from step to step."
    )


class RlRecipe(TuningRecipe):
    """``gale train rl``: a model learns from its own answers, by how good they are.

    A row is one answer with its prompt. One step learns from ``batch_rows`` answers; every ``updates_per_rollout``
    steps the model writes new ones, and each is learnt from ``epochs_per_rollout`` times.
    """

    may_change: ClassVar[frozenset[str]] = TuningRecipe.may_change | {"held_out", "reward", "gold", "critic"}

    data: Path = Field(
        description="Prompts: JSON lines of {prompt} or {messages}, with {expected} for a verifier; or prepared data, "
        "whose last answers are what is expected."
    )
    held_out: Path | None = Field(default=None, description="Prompts to evaluate on; prepared data has its own.")
    base: Path = Field(description="Model folder to start from; as it is, it is also the reference.")
    optimiser: RlOptimiser
    row_tokens: int = Field(ge=2, description="Longest prompt and answer together; longer prompts are left out.")
    answer_tokens: int = Field(ge=1, description="Longest answer.")
    evaluate_rows: int = Field(default=64, ge=1, description="Prompts of each held-out split that are answered.")

    evaluate_temperature: float = Field(
        default=0.0,
        ge=0,
        description="0: the likeliest answers; 1: such as it is trained on, but drawn alike every time.",
    )

    algorithm: Literal["grpo", "ppo"]
    reward: Reward
    gold: Reward | None = Field(
        default=None, description="Another judge, whose opinion is logged and never trained on."
    )
    unfinished_reward: float | None = Field(
        default=None, description="Reward of an answer that was cut at answer_tokens; by default it is judged as it is."
    )
    answers_per_prompt: int = Field(default=8, ge=1, description="A group, for grpo.")
    updates_per_rollout: int = Field(default=1, ge=1, description="Steps that learn from one set of answers.")
    epochs_per_rollout: int = Field(default=1, ge=1, description="How often these steps see each answer.")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="How far below 1 a probability ratio counts.")
    clip_high: float = Field(default=0.2, gt=0, description="How far above 1 (DAPO: 0.28).")
    kl_coefficient: float = Field(default=0.02, ge=0, description="Price of a nat of distance from the base model.")
    kl_in: Literal["reward", "loss"] | None = Field(
        default=None, description="Where it is paid; by default in the loss for grpo, token by token in ppo's reward."
    )

    normalise_by_deviation: bool = Field(default=True, description="grpo: divide by the group's standard deviation.")
    least_spread: float = Field(default=1e-4, ge=0, description="grpo: groups whose rewards differ less are left out.")

    gamma: float = Field(default=1.0, gt=0, le=1, description="ppo: discount of later rewards, a token.")
    gae_decay: float = Field(default=0.95, ge=0, le=1, description="ppo: lambda of the advantages.")
    value_clip: float = Field(default=0.2, gt=0, description="ppo: furthest useful step of a value.")
    value_coefficient: float = Field(default=0.5, gt=0, description="ppo: weight of the critic's loss.")
    critic: Path | None = Field(
        default=None, description="ppo: reward model to begin the critic with; by default the base with values of 0."
    )

    @property
    def rollout_rows(self) -> int:
        """Answers written at once."""
        return self.batch_rows * self.updates_per_rollout // self.epochs_per_rollout

    @property
    def kl_in_reward(self) -> bool:
        """Whether the distance from the base model is paid in the reward."""
        return (self.kl_in or {"grpo": "loss", "ppo": "reward"}[self.algorithm]) == "reward"

    @model_validator(mode="after")
    def _adds_up(self) -> RlRecipe:
        seen = self.batch_rows * self.updates_per_rollout
        if seen % self.epochs_per_rollout or self.rollout_rows % self.answers_per_prompt:
            raise ValueError(
                f"batch_rows x updates_per_rollout ({seen}) must be a multiple of epochs_per_rollout x "
                f"answers_per_prompt ({self.epochs_per_rollout * self.answers_per_prompt})"
            )
        if self.checkpoint_every % self.updates_per_rollout:
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of updates_per_rollout "
                f"({self.updates_per_rollout}): answers are not kept, so a run goes on where new ones are written"
            )
        if self.answer_tokens >= self.row_tokens:
            raise ValueError(
                f"row_tokens ({self.row_tokens}) must exceed answer_tokens ({self.answer_tokens}): prompts need room"
            )
        if self.algorithm == "grpo" and self.answers_per_prompt < 2:
            raise ValueError("grpo compares answers to one prompt: answers_per_prompt must be at least 2")
        others = _OF_PPO if self.algorithm == "grpo" else _OF_GRPO
        if foreign := [name for name in others if name in self.model_fields_set]:
            raise ValueError(f"{', '.join(foreign)} mean nothing to {self.algorithm}")
        if self.compile:
            raise ValueError("compile is of no use here: the engine reads another number of tokens in every step")
        return self
