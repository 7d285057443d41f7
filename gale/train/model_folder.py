"""From weights to a model folder and back: what stages that train a decoder share."""

from __future__ import annotations

from pathlib import Path

import torch

from gale.core import files
from gale.core.errors import DataError
from gale.model.checkpoint import save_model
from gale.model.config import ModelConfig
from gale.model.reward_model import RewardModel, save_reward_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import END_OF_TEXT, END_OF_TURN, Tokenizer

_HINT = "Prepare the data with the model's own tokenizer."


def export_decoder(model: Decoder, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write everything that a model folder in Hugging Face layout has."""
    tokenizer.settings["model_max_length"] = model.config.context_length
    ends = [token for name in (END_OF_TURN, END_OF_TEXT) if (token := tokenizer.token_id(name)) is not None]
    save_model(model, folder, dtype=dtype)
    tokenizer.save(folder)
    files.write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[-1]})


def export_reward_model(model: RewardModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write everything that the folder of a reward model in Hugging Face layout has."""
    tokenizer.settings["model_max_length"] = model.config.context_length
    save_reward_model(model, folder, dtype=dtype, pad_token_id=tokenizer.token_id(END_OF_TEXT))
    tokenizer.save(folder)


def check_fits(base: Path, config: ModelConfig, data: Path, row_tokens: int) -> None:
    """Raise :class:`DataError` unless a base model can be trained on prepared data: same vocabulary, rows that fit."""
    # The export gets the data's tokenizer, so every token must mean what the base model learned. Templates may differ.
    used = Tokenizer.load(data / "tokenizer")
    if config.vocabulary_size < used.vocabulary_size:
        raise DataError(
            f"The data in {data} was tokenised with {used.vocabulary_size} tokens, "
            f"but the model {base} knows {config.vocabulary_size}.",
            hint=_HINT,
        )
    if row_tokens > config.context_length:
        raise DataError(f"row_tokens is {row_tokens}, but {base} reads {config.context_length} at most.")
    if differing := differing_tokens(Tokenizer.load(base), used):
        raise DataError(
            f"The data in {data} was tokenised with another vocabulary than that of the model {base}: "
            f"they {differing}.",
            hint=_HINT,
        )


def differing_tokens(one: Tokenizer, other: Tokenizer) -> str:
    """How two vocabularies differ, for a message; "" where the same tokens have the same numbers."""
    if one.vocabulary == other.vocabulary:
        return ""
    differing = sorted({token for token, _ in one.vocabulary.items() ^ other.vocabulary.items()})
    return f"differ in {len(differing)} tokens, the first being {differing[0]!r}"
