"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024).

The update of an R x S matrix is scaled by 0.2 sqrt(max(R, S)), which gives it the root-mean-square that AdamW's updates
have, so that one learning rate and one weight decay serve both (Liu et al. 2025, Moonlight).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# The quintic of Jordan et al.: steepest at zero, at the price of singular values between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_ADAMW_RMS = 0.2


def newton_schulz(matrices_MRS: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor of each of M matrices [M, R, S], nearly, computed in ``dtype`` and returned in it.

    Five iterations bring every singular value into about [0.7, 1.2] whatever it was; the exact factor has ones.
    """
    tall = matrices_MRS.shape[1] > matrices_MRS.shape[2]
    x = (matrices_MRS.mT if tall else matrices_MRS).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon:
    """Steps fp32 ``matrices`` ([R, S], or [E, R, S] for E experts); the caller has put gradients into ``.grad``."""

    def __init__(self, matrices: list[Tensor], *, momentum: float, weight_decay: float, dtype: torch.dtype) -> None:
        self._matrices, self._momentum, self._weight_decay, self._dtype = matrices, momentum, weight_decay, dtype
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate ``rate``; matrices without a gradient stay as they are."""
        updates: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for matrix, momentum in zip(self._matrices, self.momenta, strict=True):
            if matrix.grad is None:
                continue
            momentum.lerp_(matrix.grad, 1 - self._momentum)
            update = matrix.grad.lerp(momentum, self._momentum)  # Nesterov
            whole = update.full_tensor() if isinstance(update, DTensor) else update
            updates.setdefault(tuple(whole.shape[-2:]), []).append((matrix, whole))
        # Matrices of one shape go together: many small products cost more than a few large ones.
        for (rows, columns), group in updates.items():
            stacked = torch.cat([update.reshape(-1, rows, columns) for _, update in group])
            scale = -rate * _ADAMW_RMS * math.sqrt(max(rows, columns))
            steps = newton_schulz(stacked, self._dtype).float().split([u.numel() // (rows * columns) for _, u in group])
            for (matrix, update), step in zip(group, steps, strict=True):
                matrix.mul_(1 - rate * self._weight_decay)
                matrix.add_(_like(step.reshape(update.shape), matrix), alpha=scale)


def _like(whole: Tensor, matrix: Tensor) -> Tensor:
    """``whole`` laid out over the processes as ``matrix`` is; every process holds all of it already."""
    if not isinstance(matrix, DTensor):
        return whole
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
