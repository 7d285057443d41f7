"""``gale train pretrain``: a new decoder learns to predict running text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gale.data.prepare import ready_data
from gale.data.shards import read_manifest
from gale.model.config import Experts, ModelConfig
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.loop import run
from gale.train.model_folder import export_decoder
from gale.train.next_token import next_token
from gale.train.recipe import PretrainRecipe
from gale.train.samples import decoder_samples
from gale.train.stage import Stage


def pretrain(recipe: PretrainRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a model of the recipe's shape from fresh weights; see :func:`gale.train.loop.run`."""
    data = ready_data(recipe.data)
    manifest = read_manifest(data)
    tokenizer = Tokenizer.load(data / "tokenizer")
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

    stage = Stage(
        name="pretrain",
        recipe=recipe,
        data=(data,),
        facts={"data_fingerprint": manifest["fingerprint"]},
        build=fresh,
        objective=next_token(recipe, data, loss_on="all", long="split"),
        export=lambda model, folder, dtype: export_decoder(model, tokenizer, folder, dtype),
        flops_per_token=config.flops_per_token(recipe.row_tokens),
        samples=decoder_samples(recipe, tokenizer, config.context_length, chat=False),
    )
    return run(stage, out, resume=resume)
