"""A tiny model with random weights in fp32: small enough to check every number, real enough to run everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gale.model.adapter_folder import save_adapter
from gale.model.checkpoint import load_model, save_model
from gale.model.config import Experts, ModelConfig
from gale.model.lora import LoraShape, adapted, add_lora
from gale.model.transformer import Decoder
from gale.text.template import GALE_CHAT_TEMPLATE
from gale.text.tokenizer import Tokenizer

TEXTS = [
    "The wind came over the hill and the door fell shut.",
    "Where does the river go? It goes to the sea, and the sea goes nowhere.",
    "风从山上吹来，门关上了。河流去哪里？河流去大海。",
] * 20

# What makes the tiny model a mixture of experts.
MIXTURE: dict[str, Any] = {
    "family": "qwen3_moe",
    "experts": Experts(count=6, per_token=2, intermediate_size=24, balance_loss=0.02, z_loss=0.003),
}


def make_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocabulary_size=400, chat_template=GALE_CHAT_TEMPLATE)


def make_model(tokenizer: Tokenizer, **changes: Any) -> Decoder:
    settings: dict[str, Any] = {
        "family": "qwen3",
        "vocabulary_size": tokenizer.vocabulary_size,
        "hidden_size": 48,
        "intermediate_size": 80,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 8,
        "context_length": 700,
    }
    model = Decoder(ModelConfig(**{**settings, **changes}))
    model.initialise(7)
    # Wider than a fresh model's weights, so that the scores differ clearly and greedy decoding has no near ties.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    return model.eval()


def save_folder(tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The tiny model and its tokenizer as a model folder; biases are drawn too, so that they show."""
    model = make_model(tokenizer, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    save_model(model, folder, dtype=dtype)
    tokenizer.save(folder)
    return folder


def save_adapter_folder(
    base: Path, folder: Path, *, seed: int, dtype: torch.dtype = torch.float32, **shape: Any
) -> Path:
    """An adapter over the model folder ``base`` whose weights are drawn, so that it changes every answer."""
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoraShape(**{"rank": 4, "alpha": 8, **shape}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted(model).values():
        for weight in (layer.lora_A.weight, layer.lora_B.weight):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save_adapter(model, folder, base=base, dtype=dtype)
    return folder
