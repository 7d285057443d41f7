"""The recipes of training stages: what a run is, apart from the data it reads."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

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
    seed: int = 0
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

    @model_validator(mode="after")
    def _micro_divides(self) -> StageRecipe:
        if self.batch_rows % self.micro_rows:
            raise ValueError(f"batch_rows ({self.batch_rows}) must be a multiple of micro_rows ({self.micro_rows})")
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


class SftRecipe(StageRecipe):
    """``gale train sft``: a chat model from a base model and conversations (supervised fine-tuning)."""

    base: Path = Field(description="Model folder to start from.")
