"""A model made ready for answering: its linear layers packed for the kernels and, if asked, rounded to 8 or 4 bits.

The packed weights are what the kernels read, and are kept on disk, so that a model is rounded once.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gale.core.errors import GaleError, ModelError
from gale.core.settings import settings
from gale.model import kernels, safetensors_file
from gale.model.checkpoint import weight_files
from gale.model.huge_pages import HugePages
from gale.model.native import NativeLayers
from gale.model.packed import PackedLinear, round_weight
from gale.model.transformer import Decoder

Weights = Literal["bf16", "int8", "int4"]
log = structlog.get_logger()

_LAYOUT = "1"  # of packed weights; a change makes those on disk worthless


def quantise(model: Decoder, weights: Weights, folder: Path | None = None) -> None:
    """Replace the linear layers of ``model`` by rounded ones or, for bf16 on a CPU with kernels for it, by packed ones.

    The output head has int8 also where the rest has int4: it costs little there and much in quality. Embeddings and
    experts stay as they are. With the model's ``folder`` what is rounded is kept under ``GALE_HOME`` and found again.
    Where the kernels can, they compute all layers in one call from now on. Raises :class:`ModelError` for rounding a
    model elsewhere than on a CPU.
    """
    if weights == "bf16":
        _pack(model)
    else:
        _round(model, weights, folder)
    model.native = NativeLayers(model) if NativeLayers.serve(model) else None


def _round(model: Decoder, weights: Weights, folder: Path | None) -> None:
    if model.embed_tokens.weight.device.type != "cpu":
        raise ModelError("int8 and int4 weights are for CPUs.", hint="Leave out --weights on a GPU.")
    kept = None if folder is None else _kept(folder, 8 if weights == "int8" else 4)
    stored = _read(kept) if kept else {}
    layers = [(name, layer, 8 if weights == "int8" or name == "lm_head" else 4) for name, layer in _linears(model)]
    memory = _memory([(layer, bits) for _, layer, bits in layers])
    made: dict[str, Tensor] = {}
    fresh = False
    for name, layer, bits in layers:
        packed, scales = stored.get(f"{name}.packed"), stored.get(f"{name}.scales")
        if packed is None or scales is None or not _fit(bits, layer, packed, scales):
            packed, scales = round_weight(bits, layer.weight.detach())
            fresh = True
        if memory is not None:
            packed, scales = memory.keep(packed), scales.clone()
        made |= {f"{name}.packed": packed, f"{name}.scales": scales}
        _replace(model, name, PackedLinear.like(layer, bits, packed, scales))
    if kept and fresh:
        try:
            shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in made.items()}
            safetensors_file.write(kept, shapes, made.items())
        except GaleError as error:  # it is only for the next start
            log.warning("rounded_weights_not_kept", error=error.message)


def _memory(layers: list[tuple[nn.Linear, int]]) -> HugePages | None:
    """Where the weights of ``layers``, packed for the kernels to so many bits, will stand one behind the other."""
    if not kernels.available():
        return None
    sizes = [kernels.packed_sizes(bits, layer.out_features, layer.in_features)[0] for layer, bits in layers]
    return HugePages(HugePages.needed(sizes))


def _fit(bits: int, layer: nn.Linear, packed: Tensor, scales: Tensor) -> bool:
    """Whether what was kept is of this layer's size: the kernels read as much as the layer says."""
    if not kernels.available():
        return packed.dtype is torch.int8 and len(packed) == len(scales) == layer.out_features
    sizes = kernels.packed_sizes(bits, layer.out_features, layer.in_features)
    return (packed.dtype, scales.dtype, packed.numel(), scales.numel()) == (torch.uint8, torch.float32, *sizes)


def _pack(model: Decoder) -> None:
    """bf16 weights in the order in which the kernels read them, which also makes a row independent of its batch."""
    weight = model.embed_tokens.weight
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu" or not kernels.has_bf16():
        return
    layers = [(name, layer) for name, layer in _linears(model) if layer.in_features % 2 == 0]
    memory = _memory([(layer, 16) for _, layer in layers])
    assert memory is not None, "there are kernels"
    for name, layer in layers:
        packed, scales = kernels.pack(16, layer.weight.detach())
        _replace(model, name, PackedLinear.like(layer, 16, memory.keep(packed), scales))


def _replace(model: Decoder, name: str, layer: PackedLinear) -> None:
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name).weight
    if isinstance(old, Tensor) and old is not model.embed_tokens.weight:  # if it was mapped, it is not looked at again
        model.mapped_bytes = max(0, model.mapped_bytes - old.nbytes)
    setattr(model.get_submodule(parent), child, layer)


def _linears(model: Decoder) -> Iterator[tuple[str, nn.Linear]]:
    """Those that are worth it: a router's scores decide too much to be rounded."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith("mlp.gate"):
            yield name, layer


def _kept(folder: Path, bits: int) -> Path:
    """Where the rounded weights of a folder are kept. Files are told apart by place, size and time, not by content."""
    about = [_LAYOUT, str(bits), str(kernels.available())]
    for path in weight_files(folder):
        status = path.stat()
        about += [str(path.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
    return settings().home / "quantised" / f"{key}.safetensors"


def _read(path: Path) -> dict[str, Tensor]:
    """What is kept there, mapped rather than read; nothing where it is damaged or was never written."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return {}
