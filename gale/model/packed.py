"""Matrices whose weights are packed for the kernels and, if asked, rounded to be read faster.

int8 has a scale for each output, int4 one for 32 inputs; activations are rounded to int8 token by token as they come
(Dettmers et al. 2022 call this vector-wise; 4-bit groups as in GPTQ and llama.cpp's Q4_0).

Shape suffixes as in :mod:`gale.model.transformer`; O outputs and I inputs of a layer, G groups of 32 inputs, A tokens
sorted by the expert that they go to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gale.model import kernels

_GROUP = 32


class PackedLinear(nn.Module):
    """A linear layer with weights of ``bits`` bits, packed for the kernels or, without those, plain for torch.

    16 bits are bf16 as it was, and for the kernels only. ``packed`` and ``scales`` are what
    :func:`gale.model.kernels.pack` makes. Without kernels int8 has ``packed`` [O, I] and ``scales`` [O]; int4 has
    ``packed`` [O, G, 32], a number a byte, and ``scales`` [O, G]. The two agree exactly in int8, in int4 but for the
    order in which groups are added.
    """

    def __init__(
        self, bits: int, inputs: int, outputs: int, packed: Tensor, scales: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.bits, self.inputs, self.outputs = bits, inputs, outputs
        self.native = packed.dtype is torch.uint8
        self.packed, self.scales, self.bias = packed, scales, None if bias is None else bias.detach().float()

    def matrix(self) -> kernels.Matrix:
        """What the kernels are told of it."""
        return kernels.Matrix.of(self.bits, self.packed, self.scales, self.bias, self.inputs, self.outputs)

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
