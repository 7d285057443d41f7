"""A model made ready for answering: its matrices packed for the kernels and, if asked, rounded to 8 or 4 bits.

Rounded ones are kept on disk (:mod:`gale.model.kept_weights`).

Shape suffixes as in :mod:`gale.model.packed`; E experts.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gale.core.errors import ModelError
from gale.model import kernels
from gale.model.experts import ExpertWeights
from gale.model.huge_pages import HugePages
from gale.model.kept_weights import KeptWeights
from gale.model.lora import ROUTER
from gale.model.native import NativeLayers
from gale.model.packed import PackedExperts, PackedLinear, round_weight
from gale.model.safetensors_file import forget
from gale.model.transformer import Decoder

Weights = Literal["bf16", "int8", "int4"]

_BITS: dict[Weights, int] = {"bf16": 16, "int8": 8, "int4": 4}


def quantise(model: Decoder, weights: Weights, folder: Path | None = None) -> threading.Thread | None:
    """Replace the matrices of ``model``, as it was opened, by rounded ones or, for bf16 on a CPU with kernels for it,
    by packed ones. What they are made from leaves the memory.

    The output head has int8 also where the rest has int4: it costs little there and much in quality. Embeddings stay as
    they are, and a router is not rounded, since its scores decide too much. With the model's ``folder`` what is rounded
    is kept on disk and found again: a thread may be writing it still, which is returned. Where the kernels can, they
    compute all layers in one call from now on. Raises :class:`ModelError` for rounding a model elsewhere than on a CPU.
    """
    bits = _BITS[weights]
    if bits < 16 and model.embed_tokens.weight.device.type != "cpu":
        raise ModelError("int8 and int4 weights are for CPUs.", hint="Leave out --weights on a GPU.")
    # By name: a list of the layers would hold them all until the end.
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | ExpertWeights)]
    wanted = {name: 16 if name.endswith(ROUTER) else 8 if name == "lm_head" and bits == 4 else bits for name in names}
    packer = _Packer(model, wanted, None if folder is None or bits == 16 else KeptWeights(folder, bits))
    for name in names:
        packer.replace(name)
    model.native = NativeLayers(model) if NativeLayers.serve(model) else None
    return packer.keep()


class _Packer:
    """Replaces layers of ``model``, each by one of so many bits; what is to be rounded is taken from ``kept`` where it
    fits. For the kernels all stand one behind the other in huge pages.
    """

    def __init__(self, model: Decoder, bits: dict[str, int], kept: KeptWeights | None) -> None:
        self._model = model
        self._bits = bits
        self._kept = kept
        self._rounded: dict[str, Tensor] = {}
        self._complete = True  # all that is rounded was kept
        like = model.embed_tokens.weight
        self._packs_bf16 = like.dtype is torch.bfloat16 and like.device.type == "cpu" and kernels.has_bf16()
        self._memory: HugePages | None = None
        if kernels.available():
            shapes = [(bits[name], *weight_OI.shape) for name in bits for _, weight_OI in self._matrices(name)]
            self._memory = HugePages(HugePages.needed([kernels.packed_sizes(*shape)[0] for shape in shapes]))

    def replace(self, name: str) -> None:
        """One layer, or all experts of one; a layer that cannot be packed stays."""
        old = self._model.get_submodule(name)
        matrices = self._matrices(name)
        if not matrices:
            return
        new: nn.Module
        if isinstance(old, ExpertWeights):
            packed = [self._pack(full_name, self._bits[name], weight_OI) for full_name, weight_OI in matrices]
            new = PackedExperts(packed[: len(packed) // 2], packed[len(packed) // 2 :])
        else:
            assert isinstance(old, nn.Linear)
            new = self._pack(name, self._bits[name], old.weight.detach(), old.bias)
            # In the bf16 of a tied head is the embedding, which is read again where it is looked at.
            if forget(old.weight) and old.weight is not self._model.embed_tokens.weight:
                self._model.mapped_bytes -= old.weight.nbytes
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, new)

    def keep(self) -> threading.Thread | None:
        """Write what was rounded for the next time, if any was; the thread that does it."""
        return None if self._kept is None or self._complete else self._kept.keep(self._rounded)

    def _matrices(self, name: str) -> list[tuple[str, Tensor]]:
        """The matrices of a layer, each with a name: one, or of all experts first the gates, then the others; none
        where they cannot be packed.
        """
        layer = self._model.get_submodule(name)
        found: list[tuple[str, Tensor]] = [(name, layer.weight.detach())] if isinstance(layer, nn.Linear) else []
        if isinstance(layer, ExpertWeights):
            for kind in ("gate_up_proj", "down_proj"):
                stack_EOI = getattr(layer, kind).detach()
                found += [(f"{name}.{kind}.{expert}", weight_OI) for expert, weight_OI in enumerate(stack_EOI)]
        can = self._bits[name] < 16 or (self._packs_bf16 and all(weight.shape[-1] % 2 == 0 for _, weight in found))
        return found if can else []

    def _pack(self, name: str, bits: int, weight_OI: Tensor, bias_O: Tensor | None = None) -> PackedLinear:
        outputs, inputs = weight_OI.shape
        packed = scales = None
        if self._kept is not None and bits < 16:
            packed, scales = self._kept.get(f"{name}.packed"), self._kept.get(f"{name}.scales")
        if packed is None or scales is None or not _fit(bits, outputs, inputs, packed, scales):
            packed, scales = round_weight(bits, weight_OI)
            self._complete = self._complete and bits == 16
        elif self._memory is None:
            self._model.mapped_bytes += packed.nbytes
        if self._memory is not None:
            mapped, packed, scales = packed, self._memory.keep(packed), scales.clone()
            forget(mapped)
        if bits < 16:
            self._rounded |= {f"{name}.packed": packed, f"{name}.scales": scales}
        return PackedLinear(bits, inputs, outputs, packed, scales, bias_O)


def _fit(bits: int, outputs: int, inputs: int, packed: Tensor, scales: Tensor) -> bool:
    """Whether what was kept is of this layer's size: the kernels read as much as the layer says."""
    if not kernels.available():
        return packed.dtype is torch.int8 and len(packed) == len(scales) == outputs
    sizes = kernels.packed_sizes(bits, outputs, inputs)
    return (packed.dtype, scales.dtype, packed.numel(), scales.numel()) == (torch.uint8, torch.float32, *sizes)
