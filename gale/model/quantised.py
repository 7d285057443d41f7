"""Matrices for answering: weights packed for the kernels and, if asked, rounded to 8 or 4 bits to be read faster.

int8 has a scale for each output, int4 one for 32 inputs; activations are rounded to int8 token by token as they come
(Dettmers et al. 2022 call this vector-wise; 4-bit groups as in GPTQ and llama.cpp's Q4_0). The packed weights are what
the kernels read; rounded ones are kept on disk (:mod:`gale.model.kept_weights`).

Shape suffixes as in :mod:`gale.model.transformer` and :mod:`gale.model.experts`; O outputs and I inputs of a layer, G
groups of 32 inputs.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gale.core.errors import ModelError
from gale.model import kernels
from gale.model.experts import ExpertWeights
from gale.model.kept_weights import KeptWeights
from gale.model.lora import ROUTER
from gale.model.safetensors_file import forget
from gale.model.transformer import Decoder

Weights = Literal["bf16", "int8", "int4"]

_BITS: dict[Weights, int] = {"bf16": 16, "int8": 8, "int4": 4}
_GROUP = 32


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
    """``packed`` and ``scales`` of :class:`PackedLinear`; 16 bits only with kernels."""
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


class PackedExperts(nn.Module):
    """The matrices of all experts of a layer, in the place of a :class:`gale.model.experts.ExpertWeights`."""

    def __init__(self, gate_up: list[PackedLinear], down: list[PackedLinear]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up), nn.ModuleList(down)

    def forward(self, x_AC: Tensor, counts: list[int]) -> Tensor:
        """SwiGLU of each expert over its own slice of ``x_AC``, ``counts`` tokens long."""
        pieces: list[Tensor] = []
        for expert, x_NC in enumerate(x_AC.split(counts)):
            if len(x_NC):
                gate_NI, up_NI = self.gate_up_proj[expert](x_NC).chunk(2, dim=-1)
                pieces.append(self.down_proj[expert](F.silu(gate_NI) * up_NI))
        return torch.cat(pieces)


def quantise(model: Decoder, weights: Weights, folder: Path | None = None) -> threading.Thread | None:
    """Replace the matrices of ``model``, as it was opened, by rounded ones or, for bf16 on a CPU with kernels for it,
    by packed ones. What they are made from leaves the memory.

    The output head has int8 also where the rest has int4: it costs little there and much in quality. Embeddings stay as
    they are, and a router is not rounded, since its scores decide too much. With the model's ``folder`` what is rounded
    is kept on disk and found again: a thread may be writing it still, which is returned. Raises :class:`ModelError` for
    rounding a model elsewhere than on a CPU.
    """
    bits = _BITS[weights]
    if bits < 16 and model.embed_tokens.weight.device.type != "cpu":
        raise ModelError("int8 and int4 weights are for CPUs.", hint="Leave out --weights on a GPU.")
    packer = _Packer(model, None if folder is None or bits == 16 else KeptWeights(folder, bits))
    # By name: a list of the layers would hold them all until the end.
    for name in [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | ExpertWeights)]:
        packer.replace(name, 16 if name.endswith(ROUTER) else 8 if name == "lm_head" and bits == 4 else bits)
    return packer.keep()


class _Packer:
    """Replaces layers of ``model``; what is to be rounded is taken from ``kept`` where it fits."""

    def __init__(self, model: Decoder, kept: KeptWeights | None) -> None:
        self._model = model
        self._kept = kept
        self._rounded: dict[str, Tensor] = {}
        self._complete = True  # all that is rounded was kept
        like = model.embed_tokens.weight
        self._packs_bf16 = like.dtype is torch.bfloat16 and like.device.type == "cpu" and kernels.has_bf16()

    def replace(self, name: str, bits: int) -> None:
        """One layer, or all experts of one; a layer that cannot be packed stays."""
        old = self._model.get_submodule(name)
        new: nn.Module
        if isinstance(old, ExpertWeights):
            stacks = [(kind, getattr(old, kind).detach()) for kind in ("gate_up_proj", "down_proj")]
            if not all(self._can_pack(bits, stack_EOI) for _, stack_EOI in stacks):
                return
            new = PackedExperts(
                *(
                    [self._pack(f"{name}.{kind}.{expert}", bits, weight_OI) for expert, weight_OI in enumerate(stack)]
                    for kind, stack in stacks
                )
            )
        else:
            assert isinstance(old, nn.Linear)
            if not self._can_pack(bits, old.weight):
                return
            new = self._pack(name, bits, old.weight.detach(), old.bias)
            # In the bf16 of a tied head is the embedding, which is read again where it is looked at.
            if forget(old.weight) and old.weight is not self._model.embed_tokens.weight:
                self._model.mapped_bytes -= old.weight.nbytes
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, new)

    def keep(self) -> threading.Thread | None:
        """Write what was rounded for the next time, if any was; the thread that does it."""
        return None if self._kept is None or self._complete else self._kept.keep(self._rounded)

    def _can_pack(self, bits: int, weight: Tensor) -> bool:
        return bits < 16 or (self._packs_bf16 and weight.shape[-1] % 2 == 0)

    def _pack(self, name: str, bits: int, weight_OI: Tensor, bias_O: Tensor | None = None) -> PackedLinear:
        outputs, inputs = weight_OI.shape
        packed = scales = None
        if self._kept is not None and bits < 16:
            packed, scales = self._kept.get(f"{name}.packed"), self._kept.get(f"{name}.scales")
        if packed is None or scales is None or not _fit(bits, outputs, inputs, packed, scales):
            packed, scales = round_weight(bits, weight_OI)
            self._complete = False
        else:
            self._model.mapped_bytes += packed.nbytes
        if bits < 16:
            self._rounded |= {f"{name}.packed": packed, f"{name}.scales": scales}
        return PackedLinear(bits, outputs, packed, scales, bias_O)


def served_by_kernels(model: Decoder) -> bool:
    """Whether nothing that takes long is left to torch in a model that :func:`quantise` has seen."""
    config, weight = model.config, model.embed_tokens.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and kernels.can_attend()
        and config.attention_softcap is None
        and config.head_dim % 4 == 0
        and not any(isinstance(layer, nn.Linear) for layer in model.modules())
    )


def _fit(bits: int, outputs: int, inputs: int, packed: Tensor, scales: Tensor) -> bool:
    """Whether what was kept is of this layer's size: the kernels read as much as the layer says."""
    if not kernels.available():
        return packed.dtype is torch.int8 and len(packed) == len(scales) == outputs
    sizes = kernels.packed_sizes(bits, outputs, inputs)
    return (packed.dtype, scales.dtype, packed.numel(), scales.numel()) == (torch.uint8, torch.float32, *sizes)
