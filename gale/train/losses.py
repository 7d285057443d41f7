"""From hidden states to log-probabilities and losses, without ever holding a vocabulary-wide fp32 matrix.

Shape suffixes as in :mod:`gale.model.transformer`: N tokens, C hidden size, V vocabulary; T of the tokens are trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gale.model.attention import PackedAttention
from gale.model.config import ModelConfig
from gale.model.reward_model import RewardModel
from gale.model.transformer import Decoder
from gale.train.batches import IGNORED, Batch

# Scores of the vocabulary that are widened to fp32 at once: few enough to stay in a processor's cache.
_WIDE_SCORES = 2**18


def hidden_states(model: Decoder, batch: Batch) -> Tensor:
    """Final hidden states [N, C] of a batch, on the model's device; attention stays within each piece."""
    x_NC: Tensor = model(*_inputs(model.config, batch, model.embed_tokens.weight.device))
    return x_NC


def token_values(model: RewardModel, batch: Batch) -> Tensor:
    """Values [N] of a batch's tokens, fp32 and differentiable, on the model's device."""
    values_N: Tensor = model(*_inputs(model.config, batch, model.score.weight.device))
    return values_N


def with_router_losses(total: Tensor, model: Decoder, items: int) -> tuple[Tensor, dict[str, float]]:
    """``total`` with the gradient of the routers' losses, weighed as the configuration says, but without their value.

    Also the losses themselves, for ``items`` items, by name. Nothing is added, and none named, for a dense model.
    """
    routers = {name: value * items for name, value in model.auxiliary_losses().items()}
    for name, value in routers.items():
        weighted = getattr(model.config.experts, name) * value
        total = total + (weighted - weighted.detach())
    return total, {name: float(value.detach()) for name, value in routers.items()}


def _inputs(config: ModelConfig, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, PackedAttention]:
    attend = PackedAttention(batch.lengths, device, config=config)
    return batch.ids_N.to(device), batch.positions_N.to(device), attend


def trained_logprobs(model: Decoder, batch: Batch) -> Tensor:
    """Natural log-probabilities [T] of the batch's trained targets, in order; fp32 and differentiable."""
    x_NC = hidden_states(model, batch)
    trained_T = (batch.targets_N != IGNORED).nonzero().squeeze(1).to(x_NC.device)
    targets_T = batch.targets_N.to(x_NC.device)[trained_T]
    # What nobody asks about is not computed: in conversations most tokens are the user's or the passage's.
    chosen_TC = x_NC if len(trained_T) == len(x_NC) else x_NC.index_select(0, trained_T)
    logprobs_T: Tensor = token_logprobs(chosen_TC, model.lm_head.weight, targets_T, model.config.logit_softcap)
    return logprobs_T


@torch.compiler.disable  # type: ignore[untyped-decorator]
def token_logprobs(x_TC: Tensor, weight_VC: Tensor, targets_T: Tensor, softcap: float | None = None) -> Tensor:
    """Log-softmax of ``x @ weight.T``, soft-capped where Gemma 2 does so, at the targets: [T], fp32, nats.

    Keeps the scores once, in the number format of ``x``; all fp32 intermediates are a few rows at a time.
    """
    logprobs_T: Tensor = _TokenLogprobs.apply(x_TC, weight_VC, targets_T, softcap)  # type: ignore[no-untyped-call]
    return logprobs_T


class _TokenLogprobs(torch.autograd.Function):
    """The gradient of the scores is (p - onehot of the target) times the row's own number, which can as well multiply
    the narrow rows of ``x`` and of its gradient. So p is all the backward pass needs, and it is cheapest to write it
    over the scores while they are at hand: no exponential is computed twice, nothing wide is touched again.
    """

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_VC: Tensor, targets_T: Tensor, softcap: float | None) -> Tensor:
        scores_TV = x_TC @ weight_VC.T
        if softcap is not None:
            scores_TV.div_(softcap).tanh_().mul_(softcap)
        tokens_T = torch.arange(len(x_TC), device=x_TC.device)
        logprobs_T = scores_TV[tokens_T, targets_T].float()
        slope_T = 1.0 if softcap is None else 1 - (logprobs_T / softcap).square()
        for low, high in _chunks(scores_TV):
            wide = scores_TV[low:high].float()
            p = torch.softmax(wide, -1)
            # The largest p is 1 / sum(exp(score - largest score)), which gives the normaliser without another pass.
            logprobs_T[low:high] -= wide.amax(-1) - p.amax(-1).log()
            scores_TV[low:high] = p if softcap is None else p * (1 - (wide / softcap).square())
        # p - 1, without the rounding of p where the target is nearly certain.
        scores_TV[tokens_T, targets_T] = (logprobs_T.expm1() * slope_T).to(scores_TV.dtype)
        ctx.save_for_backward(x_TC, weight_VC, scores_TV)
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None, None]:
        x_TC, weight_VC, error_TV = ctx.saved_tensors
        factor_T1 = -grads[0][:, None].to(x_TC.dtype)
        grad_TC = (error_TV @ weight_VC).mul_(factor_T1)
        # A frozen head (LoRA) needs no gradient, which would be as wide as the vocabulary.
        return grad_TC, error_TV.T @ (x_TC * factor_T1) if ctx.needs_input_grad[1] else None, None, None


def _chunks(scores_TV: Tensor) -> list[tuple[int, int]]:
    rows = max(1, _WIDE_SCORES // scores_TV.shape[1])
    return [(low, min(low + rows, len(scores_TV))) for low in range(0, len(scores_TV), rows)]
