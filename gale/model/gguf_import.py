"""GGUF files, llama.cpp's format, as models: their shape, their weights, and a whole folder in Hugging Face layout.

Names and keys are those of the ``gguf`` library, and what a file leaves out is what llama.cpp takes. Weights that are
packed in few bits are unpacked, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from gale.core import files
from gale.core.errors import ModelError
from gale.model.checkpoint import WEIGHTS, dtype_name, full_names, stored_weights
from gale.model.config import ModelConfig
from gale.model.gguf_file import GgufFile, GgufTensor
from gale.model.gguf_tokenizer import end_tokens, read_tokenizer
from gale.model.safetensors_file import write
from gale.model.transformer import Decoder

_ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, "LlamaForCausalLM"),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, "Qwen2ForCausalLM"),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, "Qwen3ForCausalLM"),
    "qwen3moe": (gguf.MODEL_ARCH.QWEN3MOE, "Qwen3MoeForCausalLM"),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, "Gemma2ForCausalLM"),
    "gemma3": (gguf.MODEL_ARCH.GEMMA3, "Gemma3ForCausalLM"),
    "phi3": (gguf.MODEL_ARCH.PHI3, "Phi3ForCausalLM"),
}
# Gemma's largest models, by their layers, divide by the root of another number than the head's size; no key says so.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder in Hugging Face layout, with tokenizer and chat template.

    Weights in F32 and F16 stay as they are; packed ones become bf16. Raises :class:`ModelError`.
    """
    file = GgufFile.read(path)
    config = gguf_config(file)
    tokenizer = read_tokenizer(file, config.vocabulary_size)
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16}.get(next(iter(kinds)), torch.bfloat16)
    if len(kinds) > 1:
        dtype = torch.float16 if kinds == {Kind.F16, Kind.F32} else torch.bfloat16
    shapes = {name: (dtype, list(weight.shape)) for name, weight in full_names(_empty_weights(config))}
    write(
        folder / WEIGHTS, shapes, ((name, weight.to(dtype)) for name, weight in full_names(gguf_weights(file, config)))
    )
    files.write_json(folder / "config.json", config.to_hugging_face(dtype=dtype_name(dtype)))
    files.write_json(folder / "generation_config.json", {"eos_token_id": end_tokens(file)})
    tokenizer.save(folder)


def gguf_config(file: GgufFile) -> ModelConfig:
    """The shape that a file tells. Raises :class:`ModelError` for what is missing or unsupported."""
    name = file.fields.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ModelError(
            f"Gale cannot open GGUF files of architecture {name or 'unnamed'}.",
            hint=f"Supported are: {', '.join(sorted(_ARCHITECTURES))}.",
        )
    if file.fields.get("split.count", 1) != 1:
        raise ModelError(f"{file.path} is one of several files.", hint="Join them with llama.cpp's gguf-split --merge.")
    settings = {key.removeprefix(f"{name}."): value for key, value in file.fields.items() if key.startswith(f"{name}.")}
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(value := settings.get(key), list):
            if len(set(value)) != 1:
                raise ModelError(f"Gale cannot open models whose layers differ in {key}.")
            settings[key] = value[0]
    if name == "llama" and settings.get("expert_count"):
        raise ModelError("Gale cannot open GGUF files of Mixtral.", hint="Of mixtures, Qwen3-MoE can be opened.")
    try:
        content = _content(name, settings, file.tensors)
    except KeyError as error:
        raise ModelError(f"{file.path} lacks {error.args[0]!r}.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{file.path} holds a value of the wrong kind: {error}") from error
    return ModelConfig.from_hugging_face(content)


def _content(name: str, settings: dict[str, Any], tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """What a ``config.json`` of that model would say."""
    hidden, heads, layers = (int(settings[key]) for key in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = int(settings.get("attention.key_length") or hidden // heads)
    content: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[name][1]],
        "model_type": {"qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}.get(name, name),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": settings["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": settings["context_length"],
        "rms_norm_eps": settings["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors or (name != "qwen2" and "blk.0.attn_q.bias" in tensors),
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "hidden_act": "silu",
        "sliding_window": settings.get("attention.sliding_window"),
    }
    rope: dict[str, Any] = {"rope_theta": settings.get("rope.freq_base", 1e6 if name == "gemma3" else 10_000.0)}
    kind = settings.get("rope.scaling.type", "none")
    original = settings.get("rope.scaling.original_context_length", content["max_position_embeddings"])
    if name == "phi3":
        content["original_max_position_embeddings"] = original
        content["partial_rotary_factor"] = int(settings.get("rope.dimension_count") or head_dim) / head_dim
    elif settings.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{settings['rope.dimension_count']} of {head_dim} dimensions of each head are rotated")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": settings["rope.scaling.factor"]}
        if kind == "yarn":
            rope |= {"original_max_position_embeddings": original}
            rope |= {f"beta_{end}": settings.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
    if any(factors in tensors for factors in _ROPE_FACTORS):
        # Llama 3's frequencies, for which a file has divisors only, are LongRoPE's with one set of them.
        short, long = (
            tensors.get(f"rope_factors_{kind}.weight") or tensors["rope_freqs.weight"] for kind in ("short", "long")
        )
        attention = settings.get("rope.scaling.attn_factor", 1.0)
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": attention}
        rope |= {"short_factor": short.numbers().tolist(), "long_factor": long.numbers().tolist()}
    content["rope_parameters"] = rope
    if name == "qwen3moe":
        content |= {
            "num_experts": settings["expert_count"],
            "num_experts_per_tok": settings["expert_used_count"],
            "moe_intermediate_size": settings["expert_feed_forward_length"],
            "norm_topk_prob": True,
        }
    if name in _GEMMA_27B:
        content |= {
            "query_pre_attn_scalar": hidden // heads if layers == _GEMMA_27B[name] else head_dim,
            "sliding_window": settings.get("attention.sliding_window", 4096),
            "rope_local_base_freq": settings.get("rope.freq_base_swa"),
            "attn_logit_softcapping": settings.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": settings.get("final_logit_softcapping", 30.0 if name == "gemma2" else None),
        }
    return content


def _empty_weights(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model = Decoder(config)
    yield from stored_weights(model)


def gguf_weights(file: GgufFile, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight in fp32 under the name of :func:`gale.model.checkpoint.stored_weights`, in its order.

    All names and shapes are compared before the first is given. Raises :class:`ModelError`.
    """
    name_of = gguf.get_tensor_name_map(_ARCHITECTURES[file.fields["general.architecture"]][0], config.layers)
    found: dict[str, tuple[str, int | None]] = {}
    for name, weight in _empty_weights(config):
        path, _, suffix = name.rpartition(".")
        before, _, after = path.partition(".mlp.experts.")
        expert, _, part = after.partition(".")
        path = f"{before}.mlp.experts.{part}" if after else path
        theirs = f"{name_of.get_name(path if path == 'lm_head' else f'model.{path}')}.{suffix}"
        found[name] = theirs, int(expert) if after else None
        if theirs not in file.tensors:
            raise ModelError(f"{file.path} lacks the weight {theirs}.")
        shape = file.tensors[theirs].shape
        wanted = [*([config.experts.count] if after and config.experts else []), *weight.shape]
        if shape != wanted:
            raise ModelError(f"{file.path}: weight {theirs} has shape {shape}, but its settings ask for {wanted}.")
    if unknown := sorted(file.tensors.keys() - {theirs for theirs, _ in found.values()} - {*_ROPE_FACTORS}):
        raise ModelError(f"{file.path} holds a weight that Gale has no place for: {unknown[0]}.")
    for name, (theirs, place) in found.items():
        try:
            weight = torch.from_numpy(file.tensors[theirs].numbers(place).copy())
        except NotImplementedError as error:
            kind = file.tensors[theirs].kind.name
            raise ModelError(f"{file.path}: the gguf library cannot unpack {kind}.") from error
        if config.unit_offset_norms and name.endswith("norm.weight"):
            weight -= 1
        if config.family == "llama" and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
            weight = _halves(weight, config.head_dim)
        yield name, weight


def _halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k for rotating (i, i + D/2), which llama.cpp has stored for rotating neighbours (2i, 2i + 1)."""
    pairs: Tensor = tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)
    return pairs.reshape(tensor.shape)
