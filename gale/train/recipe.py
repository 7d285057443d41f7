"""The recipes of training stages: what a run is, apart from the data it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from gale.core.recipe import Recipe


class ExpertsTable(Recipe):
    """A mixture of experts in every layer: the Qwen3-MoE decoder."""

    count: int = Field(ge=1, description="Experts of a layer.")
    per_token: int = Field(ge=1, description="Experts that compute a token.")
    intermediate_size: int = Field(ge=8, multiple_of=8, description="Hidden units of one expert.")
    normalise: bool = Field(default=True, description="The weights of a token's experts sum to 1.")
    balance_loss: float = Field(default=0.01, ge=0, description="Weight of the load-balancing loss.")
    z_loss: float = Field(default=0.001, ge=0, description="Weight of the router z-loss.")

    @model_validator(mode="after")
    def _enough_experts(self) -> ExpertsTable:
        if self.per_token > self.count:
            raise ValueError(f"per_token ({self.per_token}) must not exceed count ({self.count})")
        return self


class Shape(Recipe):
    """A new model's shape: the Qwen3 decoder, with experts if there is a table for them."""

    hidden_size: int = Field(ge=8, multiple_of=8)
    intermediate_size: int = Field(ge=8, multiple_of=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(default=64, ge=8, multiple_of=2)
    context_length: int = Field(ge=16, description="Longest sequence the model is meant for, in tokens.")
    rope_theta: float = Field(default=10_000.0, gt=0)
    tied_embeddings: bool = True
    experts: ExpertsTable | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class Optimiser(Recipe):
    """Muon (Jordan et al. 2024) or AdamW (Loshchilov & Hutter 2019), and the schedule."""

    algorithm: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: for matrices but embedding, head and router; AdamW for all else."
    )
    learning_rate: float = Field(gt=0)
    schedule: Literal["wsd", "cosine"] = Field(
        default="wsd", description="Warm-up-stable-decay, or cosine after warm-up."
    )
    warmup_steps: int = Field(default=100, ge=0)
    decay_share: float = Field(default=0.3, ge=0, le=1, description="wsd: share of the steps over which it falls.")
    final_share: float = Field(default=0.0, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    weight_decay: float = Field(default=0.1, ge=0, description="On matrices only.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="muon only.")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest global gradient norm.")
    spike_factor: float = Field(
        default=10.0, ge=0, description="Skip a step whose gradient norm is this many times the usual one; 0: never."
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Keep a moving average of the weights, and export that; 0: none."
    )


class StageRecipe(Recipe):
    """What every stage has in common."""

    # Keys that a resumed run may change: where things lie (what they hold is checked by content) and what is watched.
    may_change: ClassVar[frozenset[str]] = frozenset({"data", "base", "keep_checkpoints", "tensorboard"})

    data: Path = Field(description="Folder made by `gale data prepare`, or a data recipe (.toml) to make it from.")
    steps: int = Field(ge=1, description="Optimiser steps.")
    batch_rows: int = Field(ge=1, description="Rows of row_tokens tokens in one optimiser step.")
    micro_rows: int = Field(ge=1, description="Rows computed at once; the rest is accumulated.")
    row_tokens: int = Field(ge=16, description="Tokens of a row, into which documents are packed.")
    optimiser: Optimiser
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = Field(
        default=False, description="torch.compile: slower to start, faster to run; needs a C++ compiler."
    )
    evaluate_every: int = Field(default=200, ge=1, description="Steps between losses on the held-out splits.")
    evaluate_rows: int = Field(default=16, ge=1, description="Rows of each held-out split that are read.")
    checkpoint_every: int = Field(default=200, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="How many of the newest stay on disk.")
    sample_every: int = Field(default=0, ge=0, description="Steps between answers to sample_prompts; 0: never.")
    sample_prompts: tuple[str, ...] = Field(default=(), description="Continued greedily, for the log and the report.")
    sample_tokens: int = Field(default=48, ge=1, description="Length of a sample.")
    tensorboard: bool = Field(default=False, description="Also write event files for TensorBoard.")
    export: Literal["bf16", "fp32"] = Field(default="bf16", description="Number format of the finished model.")

    def unchangeable(self) -> dict[str, Any]:
        """The recipe as plain data without the keys that a resumed run may change."""
        content = self.model_dump(mode="json")
        for key in self.may_change:
            table, _, name = key.rpartition(".")
            (content if not table else content.get(table) or {}).pop(name, None)
        return content

    @model_validator(mode="after")
    def _micro_divides(self) -> StageRecipe:
        if self.batch_rows % self.micro_rows:
            raise ValueError(f"batch_rows ({self.batch_rows}) must be a multiple of micro_rows ({self.micro_rows})")
        return self

    @model_validator(mode="after")
    def _samples_have_prompts(self) -> StageRecipe:
        if self.sample_every and not self.sample_prompts:
            raise ValueError("sample_every asks for sample_prompts, and there are none")
        return self


class PretrainRecipe(StageRecipe):
    """``gale train pretrain``: a new model from text."""

    model: Shape

    @model_validator(mode="after")
    def _rows_fit_context(self) -> PretrainRecipe:
        if self.row_tokens > self.model.context_length:
            raise ValueError(
                f"row_tokens ({self.row_tokens}) exceeds model.context_length ({self.model.context_length})"
            )
        return self


class Lora(Recipe):
    """Low-rank adapters (Hu et al. 2022) in place of training the whole model; the result is an adapter folder."""

    rank: int = Field(default=16, ge=1, description="Width of an adapter.")
    alpha: float = Field(default=32.0, gt=0, description="Adapters count alpha / rank times.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an adapter's inputs left out in training.")
    targets: tuple[str, ...] = Field(
        default=("layers.*",), min_length=1, description="Linear layers by name or pattern, such as q_proj; * is any."
    )
    adapter: Path | None = Field(
        default=None, description="Train on from this adapter over the base, whose shape then stands."
    )

    @model_validator(mode="after")
    def _one_shape(self) -> Lora:
        if self.adapter is not None and (given := self.model_fields_set - {"adapter"}):
            raise ValueError(f"with an adapter to train on from, leave out {', '.join(sorted(given))}")
        return self


class TuningRecipe(StageRecipe):
    """What stages have in common that start from a model: all of it is trained, or adapters beside it."""

    may_change: ClassVar[frozenset[str]] = StageRecipe.may_change | {"lora.adapter"}

    base: Path = Field(description="Model folder to start from.")
    lora: Lora | None = Field(default=None, description="Train adapters instead of the whole model.")


class SftRecipe(TuningRecipe):
    """``gale train sft``: a chat model from a base model and conversations (supervised fine-tuning)."""


class PreferenceRecipe(TuningRecipe):
    """What stages on preferences have in common: a row is a pair, and ``row_tokens`` the longest half of one."""

    row_tokens: int = Field(ge=16, description="Longest prompt and answer; longer prompts lose their beginning.")


class RewardOptimiser(Optimiser):
    """As for other stages, but for what a score that begins at zero changes."""

    spike_factor: float = Field(
        default=0.0, ge=0, description="As elsewhere, but off: the gradient of a fresh score rises manyfold at first."
    )


class RewardRecipe(PreferenceRecipe):
    """``gale train reward``: a model that scores answers, from preferences (Bradley & Terry 1952)."""

    optimiser: RewardOptimiser
    margin: float = Field(default=0.0, ge=0, description="By how much the chosen answer should at least be ahead.")
    centre: float = Field(
        default=0.01, ge=0, description="Weight of the squared sum of a pair's rewards, which holds them near 0."
    )

    @model_validator(mode="after")
    def _writes_nothing(self) -> RewardRecipe:
        if self.sample_every:
            raise ValueError("a reward model writes nothing: leave out sample_every")
        return self


class ClassifierRecipe(TuningRecipe):
    """``gale train classifier``: a model that gives texts labels, each by itself."""

    data: Path = Field(description="A file (.toml) that names sources of labelled texts; see gale.train.labelled.")
    row_tokens: int = Field(ge=1, description="Longest text; of a longer one the beginning is read.")
    batch_rows: int = Field(ge=1, description="Texts in one optimiser step.")
    micro_rows: int = Field(ge=1, description="Texts computed at once; the rest is accumulated.")
    optimiser: RewardOptimiser
    evaluate_rows: int = Field(default=1000, ge=1, description="Rows of the validation part that are judged.")

    @model_validator(mode="after")
    def _trains_all_and_writes_nothing(self) -> ClassifierRecipe:
        if self.sample_every:
            raise ValueError("a classifier writes nothing: leave out sample_every")
        if self.lora is not None:
            raise ValueError("a classifier is trained whole, with its head: leave out lora")
        return self


class DpoRecipe(PreferenceRecipe):
    """``gale train dpo``: a chat model that prefers what people preferred (Rafailov et al. 2023)."""

    loss: Literal["sigmoid", "ipo"] = Field(default="sigmoid", description="DPO's own, or IPO's square.")
    beta: float = Field(default=0.1, gt=0, description="How dearly moving away from the base is paid for.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="sigmoid: the share of pairs that may be labelled the wrong way round."
    )
    length_normalised: bool = Field(default=False, description="Mean instead of summed log-probability of an answer.")
    sft_weight: float = Field(
        default=0.0, ge=0, description="Weight of the chosen answer's cross-entropy (nats per token) beside it."
    )

    @model_validator(mode="after")
    def _smoothing_of_sigmoid(self) -> DpoRecipe:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError("label_smoothing belongs to the loss sigmoid")
        return self


class GrownExperts(Recipe):
    """The experts that each feed-forward becomes: copies of it, as large as it is."""

    count: int = Field(ge=2, description="Experts of a layer.")
    per_token: int = Field(ge=1, description="Experts that compute a token.")
    redrawn: float = Field(
        default=0.0, ge=0, le=1, description="Share of each expert's units drawn anew; above 0 the function changes."
    )
    balance_loss: float = Field(default=0.01, ge=0, description="Weight of the load-balancing loss.")
    z_loss: float = Field(default=0.001, ge=0, description="Weight of the router z-loss.")

    @model_validator(mode="after")
    def _enough_experts(self) -> GrownExperts:
        if self.per_token > self.count:
            raise ValueError(f"per_token ({self.per_token}) must not exceed count ({self.count})")
        return self


class Growth(Recipe):
    """What becomes larger, and how; what is not named stays. With nothing named, the base is trained on as it is."""

    layers: int | None = Field(default=None, ge=1)
    placement: Literal["top", "interleave"] = Field(
        default="top", description="New layers: the stack again on top, or each copy above its original."
    )
    preserve: bool = Field(
        default=True, description="New layers are silent at first; false copies them whole, which changes the function."
    )
    hidden_size: int | None = Field(default=None, ge=8, multiple_of=8)
    intermediate_size: int | None = Field(default=None, ge=8, multiple_of=8)
    heads: int | None = Field(default=None, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    noise: float = Field(default=0.3, ge=0, le=1, description="Cancelling noise that lets copies part; wider only.")
    experts: GrownExperts | None = None


class GrowRecipe(StageRecipe):
    """``gale train grow``: a larger model from a trained one, and its training on text."""

    base: Path = Field(description="Model folder to grow.")
    grow: Growth
