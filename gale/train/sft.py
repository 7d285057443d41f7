"""``gale train sft``: a base model learns to answer, with the loss on the assistant's tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gale.core import files
from gale.core.errors import DataError
from gale.data.prepare import ready_data
from gale.data.shards import TokenSplit, read_manifest
from gale.model.checkpoint import load_model, weight_files
from gale.model.config import ModelConfig
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.batches import PackedRows
from gale.train.loop import Stage, run
from gale.train.recipe import SftRecipe

_HINT = "Prepare the data with the model's own tokenizer."


def sft(recipe: SftRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tune ``recipe.base``; see :func:`gale.train.loop.run`."""
    data = ready_data(recipe.data)
    manifest = read_manifest(data)
    config = ModelConfig.load(recipe.base)
    if config.vocabulary_size < manifest["vocabulary_size"]:
        raise DataError(
            f"The data in {recipe.data} was tokenised with {manifest['vocabulary_size']} tokens, "
            f"but the model {recipe.base} knows {config.vocabulary_size}.",
            hint=_HINT,
        )
    if recipe.row_tokens > config.context_length:
        raise DataError(f"row_tokens is {recipe.row_tokens}, but {recipe.base} reads {config.context_length} at most.")
    # The export gets the data's tokenizer, so every token must mean what the base model learned. Templates may differ.
    own, used = Tokenizer.load(recipe.base).vocabulary, Tokenizer.load(data / "tokenizer").vocabulary
    if own != used:
        differing = sorted({token for token, _ in own.items() ^ used.items()})
        raise DataError(
            f"The data in {recipe.data} was tokenised with another vocabulary than that of the model {recipe.base}: "
            f"they differ in {len(differing)} tokens, the first being {differing[0]!r}.",
            hint=_HINT,
        )

    def base(dtype: torch.dtype) -> Decoder:
        return load_model(recipe.base, dtype=dtype)

    def rows(split: str) -> PackedRows:
        return PackedRows(
            TokenSplit(data, split),
            row_tokens=recipe.row_tokens,
            seed=recipe.seed,
            loss_on="trained",
            long="cut",
        )

    held_out = {name: rows(name) for name in manifest["splits"] if name != "train"}
    facts = {"base_fingerprint": files.sha256_of_all(weight_files(recipe.base))}
    stage = Stage("sft", recipe, data, config, base, rows("train"), held_out)
    return run(stage, out, resume=resume, extra_facts=facts)
