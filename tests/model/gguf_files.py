"""GGUF files as llama.cpp's converter writes them, made from transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from gale.model.checkpoint import assembling
from gale.model.gguf_file import GgufFile
from gale.model.gguf_import import gguf_config, gguf_weights
from gale.model.transformer import Decoder

Pack = Callable[[str, np.ndarray], tuple[np.ndarray, Kind]]
ARCHITECTURES = {
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def open_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a file, whose tokenizer need not be there."""
    file = GgufFile.read(path)
    config = gguf_config(file)
    with assembling(config, dtype=dtype, device=None) as (model, take):
        for name, weight in gguf_weights(file, config):
            take(name, weight)
    return model.eval()


def as_fp32(name: str, numbers: np.ndarray) -> tuple[np.ndarray, Kind]:
    return numbers, Kind.F32


def packed_as(kind: Kind) -> Pack:
    """Matrices in ``kind``, vectors in fp32."""
    return lambda name, numbers: (gguf.quantize(numbers, kind), kind) if numbers.ndim > 1 else (numbers, Kind.F32)


def write_gguf(path: Path, model: Any, *, pack: Pack = as_fp32, extra: dict[str, Any] | None = None) -> None:
    """``extra`` are tensors by name and settings by the name of the writer's method."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type != "phi3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type in ("gemma2", "phi3"):
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for name, value in (extra or {}).items():
        if name.startswith("add_"):
            getattr(writer, name)(value)
        else:
            writer.add_tensor(name, np.asarray(value, np.float32))
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().numpy()
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            numbers = numbers + 1
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = numbers.reshape(-1, 2, head_dim // 2, *numbers.shape[1:])
            numbers = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(numbers.shape)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        packed, kind = pack(theirs, numbers)
        writer.add_tensor(theirs, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
