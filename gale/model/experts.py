"""A mixture of experts in place of a block's feed-forward: every token goes to the few experts its router likes best.

Shape suffixes as in :mod:`gale.model.transformer`; E experts, J chosen experts of a token, I hidden size of an expert,
A = N x J assignments of a token to an expert, sorted by expert.

References: Qwen3-MoE (Yang et al. 2025), sparsely gated experts (Shazeer et al. 2017), load-balancing loss (Switch
Transformer, Fedus et al. 2021), router z-loss (ST-MoE, Zoph et al. 2022).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gale.model.config import ModelConfig

# How the losses of a router are called, here and in :class:`gale.model.config.Experts`, which weighs them.
AUXILIARY_LOSSES = ("balance_loss", "z_loss")


class ExpertWeights(nn.Module):
    """The matrices of all experts of a layer: ``gate_up_proj`` [E, 2I, C], gate before up, and ``down_proj`` [E, C, I].

    A checkpoint holds them one by one (:mod:`gale.model.checkpoint`); stacked, a layer has two parameters, whatever
    the number of its experts.
    """

    def __init__(self, count: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, intermediate_size))

    def forward(self, x_AC: Tensor, counts: list[int]) -> Tensor:
        """SwiGLU of each expert over its own slice of ``x_AC``, ``counts`` tokens long."""
        # Experts without a token are left out: in decoding that is most of them.
        used = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in used]
        # unbind rather than indexing: its gradient is one stack instead of a full-sized sum for every expert.
        up_2IC, down_CI = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        hidden = [F.linear(x, up_2IC[expert]) for x, expert in zip(x_AC.split(sizes), used, strict=True)]
        gate_AI, up_AI = torch.cat(hidden).chunk(2, dim=-1)
        pieces = (F.silu(gate_AI) * up_AI).split(sizes)
        return torch.cat([F.linear(h, down_CI[expert]) for h, expert in zip(pieces, used, strict=True)])


class MixtureOfExperts(nn.Module):
    """Top-k routed experts; takes and returns [N, C] like a dense feed-forward.

    In training each forward leaves the router's losses in :attr:`losses`, as part of the graph, for
    :meth:`gale.model.transformer.Decoder.auxiliary_losses` to collect; in evaluation nothing is computed for them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.per_token, self.normalise = config.experts.per_token, config.experts.normalise
        self.gate = nn.Linear(config.hidden_size, config.experts.count, bias=False)
        self.experts = ExpertWeights(config.experts.count, config.hidden_size, config.experts.intermediate_size)
        self.losses: dict[str, Tensor] = {}

    def forward(self, x_NC: Tensor) -> Tensor:
        logits_NE = self.gate(x_NC)
        weights_NJ, chosen_NJ = route(logits_NE, self.per_token, normalise=self.normalise)
        self.losses = router_losses(logits_NE, chosen_NJ) if self.training else {}
        chosen_A = chosen_NJ.flatten()
        order_A = torch.argsort(chosen_A, stable=True)
        counts = torch.bincount(chosen_A, minlength=logits_NE.shape[-1]).tolist()
        back_A = torch.empty_like(order_A)
        back_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        x_AC: Tensor = _Dispatch.apply(x_NC, order_A, back_A, self.per_token)  # type: ignore[no-untyped-call]
        out_AC: Tensor = _Collect.apply(self.experts(x_AC, counts), order_A, back_A)  # type: ignore[no-untyped-call]
        # Summed token by token, so the order of addition cannot depend on what else is in the batch.
        out_NC: Tensor = (out_AC.unflatten(0, (-1, self.per_token)) * weights_NJ[..., None]).sum(1)
        return out_NC


@cache
def hide_from_compiler() -> None:
    """To be called before torch.compile, which would compile anew for every split of tokens among experts.

    It is no decorator because that loads the compiler: 70 MB of which an engine has no use.
    """
    MixtureOfExperts.forward = torch.compiler.disable(MixtureOfExperts.forward)  # type: ignore[method-assign]


def route(logits_NE: Tensor, per_token: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Weights [N, J] in the dtype of ``logits_NE`` and experts [N, J] of each token; the softmax is in fp32.

    With ``normalise`` the weights of the chosen experts sum to 1, otherwise they keep their share of all experts'.
    """
    weights_NJ, chosen_NJ = torch.softmax(logits_NE, dim=-1, dtype=torch.float32).topk(per_token, dim=-1)
    if normalise:
        weights_NJ = weights_NJ / weights_NJ.sum(-1, keepdim=True)
    return weights_NJ.to(logits_NE.dtype), chosen_NJ


def router_losses(logits_NE: Tensor, chosen_NJ: Tensor) -> dict[str, Tensor]:
    """The two unweighted losses of one router, fp32 scalars.

    ``balance_loss`` is E times the sum over experts of (assignments a token) x (mean probability): J where all experts
    are used alike, up to E where J of them get everything. ``z_loss`` is the mean squared log-sum-exp of the scores.
    """
    wide_NE = logits_NE.float()
    tokens, experts = wide_NE.shape
    share_E = torch.bincount(chosen_NJ.flatten(), minlength=experts) / tokens
    return {
        "balance_loss": experts * (share_E * wide_NE.softmax(-1).mean(0)).sum(),
        "z_loss": wide_NE.logsumexp(-1).square().mean(),
    }


# Gathering rows and its gradient are both permutations here. Autograd would take the gradient for a scatter with
# collisions: slow on a CPU, and summed in no fixed order on a GPU.


class _Dispatch(torch.autograd.Function):
    """Each token once for every expert that it goes to, sorted by expert: [N, C] -> [A, C]."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, order_A: Tensor, back_A: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(back_A)
        ctx.per_token = per_token
        return x_NC.index_select(0, order_A // per_token)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (back_A,) = ctx.saved_tensors
        return grads[0].index_select(0, back_A).unflatten(0, (-1, ctx.per_token)).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """The experts' outputs back in the order of the tokens: [A, C] -> [A, C]."""

    @staticmethod
    def forward(ctx: Any, y_AC: Tensor, order_A: Tensor, back_A: Tensor) -> Tensor:
        ctx.save_for_backward(order_A)
        return y_AC.index_select(0, back_A)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (order_A,) = ctx.saved_tensors
        return grads[0].index_select(0, order_A), None, None
