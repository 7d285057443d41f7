"""``gale train pretrain``: a new decoder learns to predict running text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gale.data.prepare import ready_data
from gale.data.shards import TokenSplit, read_manifest
from gale.model.config import Experts, ModelConfig
from gale.model.transformer import Decoder
from gale.train.batches import PackedRows
from gale.train.loop import Stage, run
from gale.train.recipe import PretrainRecipe


def pretrain(recipe: PretrainRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a model of the recipe's shape from fresh weights; see :func:`gale.train.loop.run`."""
    data = ready_data(recipe.data)
    manifest = read_manifest(data)
    shape = recipe.model
    config = ModelConfig(
        family="qwen3_moe" if shape.experts else "qwen3",
        vocabulary_size=manifest["vocabulary_size"],
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        context_length=shape.context_length,
        rope_theta=shape.rope_theta,
        tied_embeddings=shape.tied_embeddings,
        experts=Experts(**shape.experts.model_dump()) if shape.experts else None,
    )

    def fresh(dtype: torch.dtype) -> Decoder:
        model = Decoder(config)
        model.initialise(recipe.seed)
        return model.to(dtype)

    def rows(split: str) -> PackedRows:
        return PackedRows(
            TokenSplit(data, split), row_tokens=recipe.row_tokens, seed=recipe.seed, loss_on="all", long="split"
        )

    held_out = {name: rows(name) for name in manifest["splits"] if name != "train"}
    stage = Stage("pretrain", recipe, data, config, fresh, rows("train"), held_out)
    return run(stage, out, resume=resume)
