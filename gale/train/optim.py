"""Muon and AdamW over fp32 master weights, learning-rate schedules, the moving average, and steps that are skipped.

Compute weights may be bf16, which has 8 bits of precision: a step smaller than 1/256 of a weight would vanish. So the
optimiser keeps fp32 masters, steps those, and copies them into the compute weights (Micikevicius et al. 2018).
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import torch
from torch import Tensor, nn

from gale.train.muon import Muon
from gale.train.parallel import gathered, spread_like
from gale.train.recipe import Optimiser

# Matrices that are look-up tables or decide between few things: rows are used one at a time, which Muon would ignore.
_NOT_FOR_MUON = ("embed_tokens.weight", "lm_head.weight", "score.weight", "mlp.gate.weight")
_REMEMBERED_NORMS = 64
_NORMS_BEFORE_JUDGING = 16


def learning_rate(recipe: Optimiser, step: int, steps: int) -> float:
    """Learning rate of ``step`` (from 0) of ``steps``."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:  # WSD: constant, then falling in a straight line (Hu et al. 2024)
        decay_steps = max(1, round(steps * recipe.decay_share))
        shape = min(1.0, (steps - step) / decay_steps)
    return recipe.learning_rate * (recipe.final_share + (1 - recipe.final_share) * shape)


class MasterWeights:
    """Steps what is trainable in ``model`` through fp32 copies; gradients are accumulated in fp32."""

    def __init__(self, model: nn.Module, recipe: Optimiser) -> None:
        self._recipe = recipe
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self.masters = [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]
        self.averages = [master.clone() for master in self.masters] if recipe.ema_decay else []
        self._norms: deque[float] = deque(maxlen=_REMEMBERED_NORMS)
        by_muon = [
            recipe.algorithm == "muon" and master.ndim > 1 and not name.endswith(_NOT_FOR_MUON)
            for name, master in zip(self.names, self.masters, strict=True)
        ]
        self._for_muon = [master for master, chosen in zip(self.masters, by_muon, strict=True) if chosen]
        rest = [master for master, chosen in zip(self.masters, by_muon, strict=True) if not chosen]
        dtype = self._parameters[0].dtype if self._parameters else torch.float32
        self._muon = Muon(self._for_muon, momentum=recipe.momentum, weight_decay=recipe.weight_decay, dtype=dtype)
        decayed = [master for master in rest if master.ndim > 1]
        others = [master for master in rest if master.ndim < 2]
        groups = [(decayed, recipe.weight_decay), (others, 0.0)]
        self._adam = torch.optim.AdamW(
            [{"params": params, "weight_decay": decay} for params, decay in groups if params] or [torch.zeros(0)],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            fused=True,
        )

    def collect(self) -> None:
        """Add the compute weights' gradients to the masters' and clear them."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if parameter.grad is not None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

    def step(self, rate: float, gradient_scale: float) -> tuple[float, bool]:
        """Scale and clip the gradients, step, refresh the compute weights.

        Returns the unclipped global norm and whether the step was taken. It is not where the norm is not finite, and
        where it is more than ``spike_factor`` times the median of the last norms (Chowdhery et al. 2022 skip the
        batches round a spike; here the one that would make it). A norm that stays high becomes the median in time.
        """
        gradients = [master.grad for master in self.masters if master.grad is not None]
        if not gradients:  # nothing was learnt from, as where reinforcement learning found no group with a difference
            return 0.0, True
        norm = gradient_scale * float(gathered(torch.nn.utils.get_total_norm(gradients)))
        # Scaling and clipping in one pass. A norm that is no number makes no step.
        torch._foreach_mul_(gradients, gradient_scale * min(1.0, self._recipe.gradient_clip / max(norm, 1e-6)))
        taken = math.isfinite(norm) and not self._is_spike(norm)
        if math.isfinite(norm):
            self._norms.append(norm)
        if taken:
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._muon.step(rate)
            self._adam.step()
            if self.averages:
                torch._foreach_lerp_(self.averages, self.masters, 1 - self._recipe.ema_decay)
            self.refresh()
        for master in self.masters:
            master.grad = None
        return norm, taken

    def _is_spike(self, norm: float) -> bool:
        factor = self._recipe.spike_factor
        return bool(
            factor and len(self._norms) >= _NORMS_BEFORE_JUDGING and norm > factor * statistics.median(self._norms)
        )

    def refresh(self, *, averaged: bool = False) -> None:
        """Copy the masters, or their moving average where one is kept, into the compute weights."""
        sources = self.averages if averaged and self.averages else self.masters
        with torch.no_grad():
            for parameter, source in zip(self._parameters, sources, strict=True):
                parameter.copy_(source)

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights to export, by name, gathered from all processes; all must ask together."""
        sources = self.averages or self.masters
        return {name: gathered(source) for name, source in zip(self.names, sources, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named whole tensors; all processes must ask together."""
        tensors = {"norms": torch.tensor(list(self._norms), dtype=torch.float64)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master/{name}"] = gathered(master)
            for key, value in self._adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = gathered(value)
        by_id = dict(zip(map(id, self.masters), self.names, strict=True))
        for master, momentum in zip(self._for_muon, self._muon.momenta, strict=True):
            tensors[f"momentum/{by_id[id(master)]}"] = gathered(momentum)
        for name, average in zip(self.names, self.averages, strict=bool(self.averages)):
            tensors[f"average/{name}"] = gathered(average)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        self._norms.extend(tensors["norms"].tolist() if "norms" in tensors else [])
        by_muon = {id(master): momentum for master, momentum in zip(self._for_muon, self._muon.momenta, strict=True)}
        with torch.no_grad():
            for index, (name, master) in enumerate(zip(self.names, self.masters, strict=True)):
                master.copy_(spread_like(tensors[f"master/{name}"], master))
                if self.averages:
                    self.averages[index].copy_(spread_like(tensors[f"average/{name}"], master))
                if (momentum := by_muon.get(id(master))) is not None:
                    momentum.copy_(spread_like(tensors[f"momentum/{name}"], momentum))
                elif f"step/{name}" in tensors:
                    self._adam.state[master] = {
                        "step": tensors[f"step/{name}"].to(master.device, copy=True),
                        **{
                            key: spread_like(tensors[f"{key}/{name}"], master).clone()
                            for key in ("exp_avg", "exp_avg_sq")
                        },
                    }
        self.refresh()
