"""AdamW over fp32 master weights, and learning-rate schedules.

Compute weights may be bf16, which has 8 bits of precision: a step smaller than 1/256 of a weight would vanish. So the
optimiser keeps fp32 masters, steps those, and copies them into the compute weights (Micikevicius et al. 2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gale.train.recipe import Optimiser


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


class MasterWeightAdamW:
    """Steps the parameters of ``model`` through fp32 copies; gradients are accumulated in fp32."""

    def __init__(self, model: nn.Module, recipe: Optimiser) -> None:
        self._recipe = recipe
        self.names = [name for name, _ in model.named_parameters()]
        self._parameters = [parameter for _, parameter in model.named_parameters()]
        self.masters = [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]
        matrices = [master for master in self.masters if master.ndim > 1]
        vectors = [master for master in self.masters if master.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
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

    def step(self, rate: float, gradient_scale: float) -> float:
        """Scale and clip the gradients, step, refresh the compute weights; returns the unclipped global norm.

        A norm that is not finite is returned without stepping.
        """
        gradients = [master.grad for master in self.masters if master.grad is not None]
        torch._foreach_mul_(gradients, gradient_scale)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self._recipe.gradient_clip))
        if not math.isfinite(norm):
            return norm
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.refresh()
        return norm

    def refresh(self) -> None:
        """Copy the masters into the compute weights."""
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self.masters, strict=True):
                parameter.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master/{name}"] = master
            for key, value in self._adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        with torch.no_grad():
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(tensors[f"master/{name}"])
                self._adam.state[master] = {
                    key: tensors[f"{key}/{name}"].to(master.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.refresh()
