"""Linear layers for answering: weights packed for the kernels and, if asked, rounded to 8 or 4 bits to be read faster.

int8 has a scale for each output, int4 one for 32 inputs; activations are rounded to int8 token by token as they come
(Dettmers et al. 2022 call this vector-wise; 4-bit groups as in GPTQ and llama.cpp's Q4_0). The packed weights are what
the kernels read, and are kept on disk, so that a model is rounded once.

Shape suffixes as in :mod:`gale.model.transformer`; O outputs and I inputs of a layer, G groups of 32 inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gale.core import files
from gale.core.errors import GaleError, ModelError
from gale.core.settings import settings
from gale.model import kernels
from gale.model.checkpoint import weight_files
from gale.model.transformer import Decoder

Weights = Literal["bf16", "int8", "int4"]
log = structlog.get_logger()

_GROUP = 32
_LAYOUT = "1"  # of packed weights; a change makes those on disk worthless


class PackedLinear(nn.Module):
    """A linear layer with weights of ``bits`` bits, packed for the kernels or, without those, plain for torch.

    16 bits are bf16 as it was, and for the kernels only. ``packed`` and ``scales`` are what
    :func:`gale.model.kernels.pack` makes. Without kernels int8 has ``packed`` [O, I] and ``scales`` [O]; int4 has
    ``packed`` [O, G, 32], a number a byte, and ``scales`` [O, G]. The two agree exactly in int8, in int4 but for the
    order in which groups are added.
    """

    def __init__(self, bits: int, outputs: int, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.outputs, self.native = bits, outputs, packed.dtype is torch.uint8
        self.packed, self.scales, self.bias = packed, scales, None if bias is None else bias.detach().float()

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] -> [N, O] in the dtype of ``x_NC``."""
        if self.native:
            return kernels.linear(self.bits, x_NC, self.packed, self.scales, self.bias, self.outputs)
        wide_NC = x_NC.float()
        largest_N1 = wide_NC.abs().amax(-1, keepdim=True)
        rounded_NC = (wide_NC * (127 / largest_N1).nan_to_num(posinf=0)).round().to(torch.int8)
        if self.bits == 8:
            out_NO = torch._int_mm(rounded_NC, self.packed.t()).float() * self.scales
        else:
            weight_OI = (self.packed.float() * self.scales[..., None]).flatten(1)
            out_NO = F.linear(F.pad(rounded_NC, (0, weight_OI.shape[1] - x_NC.shape[1])).float(), weight_OI)
        out_NO = out_NO * (largest_N1 / 127)
        return (out_NO if self.bias is None else out_NO + self.bias).to(x_NC.dtype)


def round_weight(bits: int, weight_OC: Tensor) -> tuple[Tensor, Tensor]:
    """``packed`` and ``scales`` of :class:`PackedLinear`."""
    if kernels.available():
        return kernels.pack(bits, weight_OC)
    wide_OC = weight_OC.float()
    if bits == 8:
        scales_O = wide_OC.abs().amax(-1) / 127
        return (wide_OC / scales_O[:, None]).nan_to_num().round().to(torch.int8), scales_O
    wide_OGK = F.pad(wide_OC, (0, -wide_OC.shape[1] % _GROUP)).unflatten(1, (-1, _GROUP))
    furthest_OG1 = wide_OGK.gather(-1, wide_OGK.abs().argmax(-1, keepdim=True))
    best_OGK, best_OG = torch.zeros_like(wide_OGK), torch.zeros_like(furthest_OG1)
    least_OG1 = torch.full_like(furthest_OG1, torch.inf)
    for step in range(12):  # the same scales are tried as in linear.cpp
        scale_OG1 = (furthest_OG1 / (-9 + 0.25 * step)).half().float()
        q_OGK = (wide_OGK / scale_OG1).nan_to_num().round().clamp(-8, 7)
        error_OG1 = (q_OGK * scale_OG1 - wide_OGK).square().sum(-1, keepdim=True)
        better_OG1 = error_OG1 < least_OG1
        best_OGK, best_OG = torch.where(better_OG1, q_OGK, best_OGK), torch.where(better_OG1, scale_OG1, best_OG)
        least_OG1 = torch.minimum(error_OG1, least_OG1)
    return best_OGK.to(torch.int8), best_OG[..., 0]


def quantise(model: Decoder, weights: Weights, folder: Path | None = None) -> None:
    """Replace the linear layers of ``model`` by rounded ones or, for bf16 on a CPU with kernels for it, by packed ones.

    The output head has int8 also where the rest has int4: it costs little there and much in quality. Embeddings and
    experts stay as they are. With the model's ``folder`` what is rounded is kept under ``GALE_HOME`` and found again.
    Raises :class:`ModelError` for rounding a model elsewhere than on a CPU.
    """
    if weights == "bf16":
        _pack(model)
        return
    if model.embed_tokens.weight.device.type != "cpu":
        raise ModelError("int8 and int4 weights are for CPUs.", hint="Leave out --weights on a GPU.")
    bits = 8 if weights == "int8" else 4
    kept = None if folder is None else _kept(folder, bits)
    stored = _read(kept) if kept else {}
    fresh: dict[str, Tensor] = {}
    kept_bytes = 0
    for name, layer in list(_linears(model)):
        wanted = 8 if name == "lm_head" else bits
        packed, scales = stored.get(f"{name}.packed"), stored.get(f"{name}.scales")
        if packed is None or scales is None or not _fit(wanted, layer, packed, scales):
            packed, scales = round_weight(wanted, layer.weight.detach())
            fresh |= {f"{name}.packed": packed, f"{name}.scales": scales}
        else:
            kept_bytes += packed.nbytes
        _replace(model, name, PackedLinear(wanted, layer.out_features, packed, scales, layer.bias))
    model.mapped_bytes += kept_bytes
    if kept and fresh:
        try:
            files.write_bytes(kept, save(fresh))
        except GaleError as error:  # it is only for the next start
            log.warning("rounded_weights_not_kept", error=error.message)


def served_by_kernels(model: Decoder) -> bool:
    """Whether nothing that takes long is left to torch in a model that :func:`quantise` has seen."""
    config, weight = model.config, model.embed_tokens.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and kernels.can_attend()
        and config.experts is None
        and config.attention_softcap is None
        and config.head_dim % 4 == 0
        and not any(isinstance(layer, nn.Linear) for layer in model.modules())
    )


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
    for name, layer in list(_linears(model)):
        if layer.in_features % 2 == 0:
            packed, scales = kernels.pack(16, layer.weight.detach())
            _replace(model, name, PackedLinear(16, layer.out_features, packed, scales, layer.bias))


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
