"""Low-rank adaptation (LoRA, Hu et al. 2022): frozen matrices with a trained product of two narrow ones beside them.

A linear layer computes ``W x + (alpha / rank) B A x`` with A [rank, in] and B [out, rank]. B begins at zero, so a fresh
adapter changes nothing. Only A and B hold optimiser state; the base may be bf16 without masters of its own.
Adapter folders stand in :mod:`gale.model.adapter_folder`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gale.core.errors import ModelError
from gale.model.reward_model import RewardModel
from gale.model.transformer import Decoder

# Every linear layer of every block: what QLoRA (Dettmers et al. 2023) found to be needed to match full training.
ALL_LINEARS = ("layers.*",)
ROUTER = ".mlp.gate"  # decides between experts; a part of them in all but name


@dataclass(frozen=True, slots=True)
class LoraShape:
    """``targets`` are patterns (``q_proj``, ``layers.3.*``) for a layer's whole name or the last part of it."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL_LINEARS


class LoraLinear(nn.Linear):
    """A linear layer whose own weights are frozen, with ``lora_A`` and ``lora_B`` beside them."""

    def __init__(self, linear: nn.Linear, shape: LoraShape, generator: torch.Generator) -> None:
        # Built without weights, which are then the very ones of the layer that is replaced.
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Linear(linear.in_features, shape.rank, bias=False, **like)
        self.lora_B = nn.Linear(shape.rank, linear.out_features, bias=False, **like)
        drawn = torch.empty(shape.rank, linear.in_features)  # in fp32 on the CPU, so the same in any format anywhere
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = shape.alpha / shape.rank
        self.dropout = shape.dropout
        self.train(linear.training)  # a new module trains, even beside a model that only answers

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.lora_A(dropped)) * self.scale  # type: ignore[no-any-return]

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same; the sum is made in fp32."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale
        plain.weight = nn.Parameter((self.weight.float() + delta).to(self.weight.dtype))
        plain.bias = self.bias
        return plain


def add_lora(model: Decoder | RewardModel, shape: LoraShape, *, seed: int) -> None:
    """Freeze ``model`` and put adapters beside the linear layers that ``shape`` names; a ``score`` stays trained.

    Raises :class:`ModelError` where a pattern names none, and for experts, whose weights are stacked and have no
    linear layers to adapt.
    """
    decoder = decoder_of(model)
    linears = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.") and not name.endswith(ROUTER)
    }
    if getattr(decoder.config, "experts", None) and any(_matches("layers.0.mlp.experts", t) for t in shape.targets):
        raise ModelError(
            "LoRA cannot adapt the stacked weights of a mixture of experts yet.",
            hint='Adapt the attention alone: lora.targets = ["q_proj", "k_proj", "v_proj", "o_proj"].',
        )
    if idle := [t for t in shape.targets if not any(_matches(name, t) for name in linears)]:
        kinds = sorted({name.rpartition(".")[2] for name in linears})
        raise ModelError(f"The model has no linear layer {idle[0]!r} to adapt.", hint=f"It has {', '.join(kinds)}.")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if any(_matches(name, target) for target in shape.targets):
            _replace(decoder, name, LoraLinear(linear, shape, generator))
    if isinstance(model, RewardModel):
        model.score.requires_grad_(True)


def merge_lora(model: Decoder | RewardModel) -> None:
    """Add every adapter to the weights that it stands beside; the model computes the same and is a plain one again."""
    decoder = decoder_of(model)
    for name, module in adapted(model).items():
        _replace(decoder, name, module.merged())


def adapted(model: Decoder | RewardModel) -> dict[str, LoraLinear]:
    """The adapted layers by their name in the decoder, in order."""
    return {name: module for name, module in decoder_of(model).named_modules() if isinstance(module, LoraLinear)}


def decoder_of(model: Decoder | RewardModel) -> Decoder:
    """The decoder that ``model`` is or stands on."""
    return model.trunk if isinstance(model, RewardModel) else model


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name.rpartition(".")[2], target)


def _replace(decoder: Decoder, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(decoder.get_submodule(parent), child, module)
