"""``gale train sft``: a base model learns to answer, with the loss on the assistant's tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gale.core import files
from gale.data.prepare import ready_data
from gale.data.shards import read_manifest
from gale.model.checkpoint import load_model, weight_files
from gale.model.config import ModelConfig
from gale.text.tokenizer import Tokenizer
from gale.train.loop import run
from gale.train.model_folder import check_fits, export_decoder
from gale.train.next_token import next_token
from gale.train.recipe import SftRecipe
from gale.train.samples import decoder_samples
from gale.train.stage import Stage


def sft(recipe: SftRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tune ``recipe.base``; see :func:`gale.train.loop.run`."""
    data = ready_data(recipe.data)
    manifest = read_manifest(data)
    config = ModelConfig.load(recipe.base)
    check_fits(recipe.base, config, data, recipe.row_tokens)
    tokenizer = Tokenizer.load(data / "tokenizer")
    stage = Stage(
        name="sft",
        recipe=recipe,
        data=(data,),
        facts={
            "data_fingerprint": manifest["fingerprint"],
            "base_fingerprint": files.sha256_of_all(weight_files(recipe.base)),
        },
        build=lambda dtype: load_model(recipe.base, dtype=dtype),
        objective=next_token(recipe, data, loss_on="trained", long="cut"),
        export=lambda model, folder, dtype: export_decoder(model, tokenizer, folder, dtype),
        flops_per_token=config.flops_per_token(recipe.row_tokens),
        samples=decoder_samples(recipe, tokenizer, config.context_length, chat=True),
    )
    return run(stage, out, resume=resume)
