"""A model made ready for answering: its matrices packed for the kernels and, if asked, rounded to 8 or 4 bits.

Rounded ones are kept on disk (:mod:`gale.model.kept_weights`).

Shape suffixes as in :mod:`gale.model.packed`; E experts.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

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
    own = {
        name: 16 if name.endswith(ROUTER) else 8 if name == "lm_head" and bits == 4 else bits
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | ExpertWeights)
    }
    packer = _Packer(model, own, None if folder is None or bits == 16 else KeptWeights(folder, bits))
    writing = packer.run()
    model.native = NativeLayers(model) if NativeLayers.serve(model) else None
    return writing


class _Packer:
    """Replaces the layers of ``model`` that ``bits`` names; what is to be rounded is taken from ``kept`` if it fits."""

    def __init__(self, model: Decoder, bits: dict[str, int], kept: KeptWeights | None) -> None:
        self._model = model
        like = model.embed_tokens.weight
        packs_bf16 = like.dtype is torch.bfloat16 and like.device.type == "cpu" and kernels.has_bf16()
        shapes = {name: [weight.shape for _, weight in self._matrices(name)] for name in bits}
        self._bits = {
            name: own
            for name, own in bits.items()
            if own < 16 or (packs_bf16 and all(inputs % 2 == 0 for _, inputs in shapes[name]))
        }
        self._kept = kept
        self._rounded: dict[str, Tensor] = {}
        self._complete = True  # all that is rounded was kept
        self._memory: HugePages | None = None
        if kernels.available():
            sizes = [kernels.packed_sizes(own, *shape)[0] for name, own in self._bits.items() for shape in shapes[name]]
            self._memory = HugePages(HugePages.needed(sizes))

    def run(self) -> threading.Thread | None:
        """Do it, and write what was rounded for the next time, if any was; the thread that does it."""
        for name, bits in self._bits.items():
            old: Any = self._model.get_submodule(name)
            bias = old.bias if isinstance(old, nn.Linear) else None
            layers = [self._pack(full, bits, weight_OI, bias) for full, weight_OI in self._matrices(name)]
            new: nn.Module = layers[0]
            if isinstance(old, ExpertWeights):
                new = PackedExperts(layers[: len(layers) // 2], layers[len(layers) // 2 :])
            # A tied head is the embedding, too, which is read again where it is looked at.
            elif forget(old.weight) and old.weight is not self._model.embed_tokens.weight:
                self._model.mapped_bytes -= old.weight.nbytes
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, new)
        return None if self._kept is None or self._complete else self._kept.keep(self._rounded)

    def _matrices(self, name: str) -> list[tuple[str, Tensor]]:
        """The matrices of a layer by name; of experts first those of all that come first."""
        layer = self._model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            return [(name, layer.weight.detach())]
        assert isinstance(layer, ExpertWeights)
        stacks = {kind: getattr(layer, kind).detach() for kind in ("gate_up_proj", "down_proj")}
        return [
            (f"{name}.{kind}.{expert}", weight) for kind, stack in stacks.items() for expert, weight in enumerate(stack)
        ]

    def _pack(self, name: str, bits: int, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        outputs, inputs = weight_OI.shape
        found = self._find(name, bits, outputs, inputs) if bits < 16 else None
        if self._memory is None:
            packed, scales = found or round_weight(bits, weight_OI)
            self._model.mapped_bytes += packed.nbytes if found else 0
        elif found:
            packed, scales = self._memory.room(len(found[0])).copy_(found[0]), found[1].clone()
            forget(found[0])
        else:
            packed, scales = kernels.pack(bits, weight_OI, self._memory.room)
        if bits < 16:
            self._rounded |= {f"{name}.packed": packed, f"{name}.scales": scales}
            self._complete = self._complete and found is not None
        return PackedLinear(bits, inputs, outputs, packed, scales, bias_O)

    def _find(self, name: str, bits: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor] | None:
        """What was kept of a matrix, if it is of its size: the kernels read as much as the layer says."""
        packed, scales = (self._kept.get(f"{name}.{part}") if self._kept else None for part in ("packed", "scales"))
        if packed is None or scales is None:
            return None
        if kernels.available():
            sizes = kernels.packed_sizes(bits, outputs, inputs)
            fits = (packed.dtype, scales.dtype, packed.numel(), scales.numel()) == (torch.uint8, torch.float32, *sizes)
        else:
            fits = packed.dtype is torch.int8 and len(packed) == len(scales) == outputs
        return (packed, scales) if fits else None
