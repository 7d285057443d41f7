"""A model folder as one GGUF file, the format of llama.cpp and of what is built on it.

Names and keys are those of the ``gguf`` library, what they mean is what llama.cpp does with them: a model that it
would compute differently is refused. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from gale.core import files
from gale.core.errors import GaleError, ModelError
from gale.model.checkpoint import load_model, load_tokenizer, stored_dtype
from gale.model.config import ModelConfig
from gale.model.gguf_file import is_gguf
from gale.model.gguf_vocabulary import GgufVocabulary
from gale.model.transformer import Decoder, rotary_frequencies

# What --dtype may say, and what the file's header calls it.
FORMATS = {
    "fp32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_DIVISORS = ("llama3", "longrope")  # scalings that a file tells as one divisor for each frequency
_SCALINGS = ("linear", *_DIVISORS)


def export_gguf(folder: Path, out: Path, *, kind: str, name: str) -> None:
    """Write the model of ``folder`` to the file ``out`` in the number format ``kind``, under the title ``name``.

    Raises :class:`ModelError` where GGUF or llama.cpp has no place for something of the model, and
    :class:`GaleError` where ``out`` is something else already. No more than one weight is held in fp32 at a time.
    """
    config = ModelConfig.load(folder)
    _refuse_what_llama_cpp_lacks(config)
    vocabulary = GgufVocabulary.read(folder, load_tokenizer(folder, config), config.vocabulary_size)
    if out.is_dir() or (out.is_file() and not is_gguf(out)):
        raise GaleError(f"{out} is something else and is not replaced.", hint="Choose another --out.")
    model = load_model(folder, dtype=stored_dtype(folder))
    default, file_type = FORMATS[kind]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.family]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    vocabulary.write(writer)
    kinds: list[Kind] = []
    for tensor_name, tensor in _tensors(model):
        kinds.append(_kind_of(tensor_name, tensor, default))
        element = np.dtype(np.float32 if kinds[-1] == Kind.F32 else np.float16)
        shape, raw = list(tensor.shape), None
        size = tensor.numel() * element.itemsize
        if kinds[-1] in (Kind.BF16, Kind.Q8_0):
            shape, element, raw = list(gguf.quant_shape_to_byte_shape(shape, kinds[-1])), np.dtype(np.uint8), kinds[-1]
            size = int(np.prod(shape))
        writer.add_tensor_info(tensor_name, shape, element, size, raw_dtype=raw)
    with files.new_file(out) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (tensor_name, tensor), stored in zip(_tensors(model), kinds, strict=True):
                writer.write_tensor_data(_encoded(tensor_name, tensor, stored))
        finally:
            writer.close()


def _refuse_what_llama_cpp_lacks(config: ModelConfig) -> None:
    experts, scaling = config.experts, config.rope_scaling
    if config.family not in _ARCHITECTURES or (scaling is not None and scaling.kind not in _SCALINGS):
        what = f"{config.family} models" + (f" with {scaling.kind} RoPE scaling" if scaling else "")
        raise ModelError(f"Gale cannot export {what} to GGUF.", hint="llama.cpp's own converter reads the folder.")
    problem = None
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        problem = "sliding-window attention in this architecture"
    elif config.output_bias and config.family != "llama":
        problem = "a bias on the attention's output"
    elif scaling is not None and scaling.kind in _DIVISORS and config.family != "llama":
        problem = f"{scaling.kind} RoPE scaling outside Llama"
    elif scaling is not None and (scaling.attention_factor != 1 or scaling.short != scaling.long):
        problem = "RoPE scaling that depends on the length in this architecture"
    elif experts is not None and not experts.normalise:
        problem = "experts whose weights do not sum to 1"
    elif experts is not None and not all(map(config.has_experts, range(config.layers))):
        problem = "layers without experts beside layers with them"
    if problem:
        raise ModelError(f"llama.cpp does not compute {problem}, so this model cannot be exported to GGUF.")


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocabulary_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        writer.add_expert_feed_forward_length(config.experts.intermediate_size)


def _tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, by its name there."""
    config = model.config
    architecture = _ARCHITECTURES[config.family]
    names = gguf.get_tensor_name_map(architecture, config.layers)

    def named(path: str, suffix: str) -> str:
        found = names.get_name(path if path == "lm_head" else f"model.{path}")
        assert found is not None, f"the gguf library has no name for {path}"
        return f"{found}.{suffix}"

    if config.rope_scaling is not None and config.rope_scaling.kind in _DIVISORS:
        plain = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        yield "rope_freqs.weight", plain / rotary_frequencies(config)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu()
        path, _, suffix = name.rpartition(".")
        if suffix == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield named(f"{path}.gate_proj", "weight"), gate
            yield named(f"{path}.up_proj", "weight"), up
        elif suffix == "down_proj":
            yield named(f"{path}.down_proj", "weight"), tensor
        elif architecture == gguf.MODEL_ARCH.LLAMA and path.endswith(("q_proj", "k_proj")):
            yield named(path, suffix), _interleaved(tensor, config.head_dim)
        else:
            yield named(path, suffix), tensor


def _interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k for rotating neighbours (2i, 2i + 1), as llama.cpp does for Llama, instead of (i, i + D/2)."""
    pairs: Tensor = tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
    return pairs.reshape(tensor.shape)


def _kind_of(name: str, tensor: Tensor, default: Kind) -> Kind:
    """llama.cpp wants vectors and routers in fp32; rows that do not fill whole blocks stay in fp16."""
    if tensor.ndim == 1 or ".ffn_gate_inp." in name:
        return Kind.F32
    if default == Kind.Q8_0 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]:
        return Kind.F16
    return default


def _encoded(name: str, tensor: Tensor, kind: Kind) -> np.ndarray:
    values = tensor.float().contiguous().numpy()
    if not np.isfinite(values).all():
        raise ModelError(
            f"{name} holds values that are no numbers.", hint="Its training has failed; take an earlier one."
        )
    if kind in (Kind.F16, Kind.Q8_0) and np.abs(values).max() > np.finfo(np.float16).max:
        raise ModelError(f"{name} holds values too large for {kind.name}.", hint="Use --dtype bf16 or fp32.")
    encoded: np.ndarray = gguf.quantize(values, kind)
    return encoded
