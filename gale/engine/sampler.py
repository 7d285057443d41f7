"""Choosing the next token from its scores, for many answers at once.

Every request has a random generator of its own, so its answer does not depend on what else is in the batch. Scores
are changed (:mod:`gale.engine.penalties`), masked by a constraint, divided by the temperature, and then top-k, top-p
and min-p leave out what is unlikely, in the order of Hugging Face transformers.

Shape suffixes: S answers, V vocabulary, P the tokens that may still be chosen, R those that are looked at together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gale.engine.penalties import Penalties
from gale.engine.request import SamplingParams
from gale.model import kernels

# Enough for top-p in nearly every case; sorting a whole vocabulary for each token would cost milliseconds.
_SHORT_LIST = 256
# Scores that are worked on at once; their sums are in fp64, so this is 16 MB.
_SCORES_AT_ONCE = 2**21
# Below this the likeliest token is certain, and smaller numbers would not be numbers in fp32.
_LEAST_TEMPERATURE = 1e-30


class Constraint(Protocol):
    """What an answer may say, token by token."""

    @property
    def complete(self) -> bool:
        """Whether nothing more may follow."""

    def mask(self, logits_V: Tensor) -> None:
        """Set the scores of all tokens that may not come next to minus infinity, in place."""

    def commit(self, token: int) -> None:
        """Take note that ``token`` came next."""


class Sampler:
    """What choosing the tokens of one answer needs to know and to remember."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self.params = params
        self.constraint = constraint
        self._penalties = Penalties(params, prompt) if Penalties.wanted(params) else None
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    def draw(self) -> float:
        """The answer's next random number, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    @property
    def edits(self) -> bool:
        """Whether :meth:`edit` does anything."""
        return self._penalties is not None or self.constraint is not None

    @property
    def complete(self) -> bool:
        """Whether a constraint allows nothing more."""
        return self.constraint is not None and self.constraint.complete

    def edit(self, logits_V: Tensor) -> None:
        """Change the scores of the next token, in place, as parameters and constraint ask for."""
        if self._penalties is not None:
            self._penalties.apply(logits_V)
        if self.constraint is not None:
            self.constraint.mask(logits_V)

    def commit(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if self._penalties is not None:
            self._penalties.note(token)
        if self.constraint is not None:
            self.constraint.commit(token)


def choose(samplers: list[Sampler], logits_SV: Tensor) -> list[int]:
    """One token id for each sampler from its row of scores, which stay as they are."""
    tokens: list[int] = []
    at_once = max(1, _SCORES_AT_ONCE // logits_SV.shape[1])
    for low in range(0, len(samplers), at_once):
        tokens += _choose(samplers[low : low + at_once], logits_SV[low : low + at_once])
    return tokens


def _choose(samplers: list[Sampler], logits_RV: Tensor) -> list[int]:
    edited = [row for row, sampler in enumerate(samplers) if sampler.edits]
    params = [sampler.params for sampler in samplers]
    if not edited and all(p.temperature == 0 for p in params):
        likeliest: list[int] = likeliest_tokens(logits_RV).tolist()
        return likeliest
    # A copy: whoever asks for log-probabilities wants the model's own.
    logits_RV = logits_RV.to(torch.float32, copy=bool(edited))
    for row in edited:
        samplers[row].edit(logits_RV[row])
    tokens_R = logits_RV.argmax(-1)
    for filtered in (False, True):
        rows = [row for row, p in enumerate(params) if p.temperature > 0 and _filters(p) == filtered]
        if not rows:
            continue
        scores_RV = logits_RV if len(rows) == len(params) else logits_RV[rows]
        temperature_R = torch.tensor([float(params[row].temperature) for row in rows]).clamp_(min=_LEAST_TEMPERATURE)
        # Divided after subtracting the maximum, so that a tiny temperature cannot overflow.
        scores_RV = (scores_RV - scores_RV.amax(-1, keepdim=True)) / temperature_R[:, None]
        probabilities_RV = torch.softmax(scores_RV, dim=-1)
        drawn_R = torch.tensor([samplers[row].draw() for row in rows], dtype=torch.float64)
        if filtered:
            tokens_R[rows] = _draw_likely(probabilities_RV, [params[row] for row in rows], drawn_R)
        else:
            tokens_R[rows] = _draw(probabilities_RV, drawn_R)
    tokens: list[int] = tokens_R.tolist()
    return tokens


def likeliest_tokens(logits_RV: Tensor) -> Tensor:
    """The token [R] with the highest score in each row."""
    return kernels.likeliest(logits_RV) if kernels.serve(logits_RV) else logits_RV.argmax(-1)


def _filters(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _draw(weights_RP: Tensor, drawn_R: Tensor) -> Tensor:
    """The place [R] in each row that a number in [0, 1) falls on, where a place is as wide as its weight."""
    cumulative_RP = weights_RP.double().cumsum(-1)
    drawn_R1 = (drawn_R * cumulative_RP[:, -1])[:, None]
    place_R = torch.searchsorted(cumulative_RP, drawn_R1, right=True)[:, 0]
    return place_R.clamp_(max=weights_RP.shape[1] - 1)


def _draw_likely(probabilities_RV: Tensor, params: list[SamplingParams], drawn_R: Tensor) -> Tensor:
    """As :func:`_draw`, among the tokens that top-k, top-p and min-p leave, the likeliest in any case."""
    vocabulary = probabilities_RV.shape[1]
    top_k_R = torch.tensor([p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params])
    top_p_R = torch.tensor([float(p.top_p) if p.top_p < 1 else torch.inf for p in params])
    min_p_R = torch.tensor([float(p.min_p) for p in params])
    best_RP, ids_RP = probabilities_RV.topk(min(_SHORT_LIST, vocabulary))
    # The whole vocabulary is looked at where what is left out may begin beyond the short list.
    tail_R = (best_RP.sum(-1) < top_p_R) & (best_RP[:, -1] >= min_p_R * best_RP[:, 0])
    long = (top_k_R > best_RP.shape[1]) & ((top_k_R < vocabulary) | tail_R)
    chosen_R = torch.empty(len(params), dtype=torch.int64)
    for rows, (weights_RP, tokens_RP) in (
        (~long, (best_RP[~long], ids_RP[~long])),
        (long, probabilities_RV[long].sort(descending=True)),
    ):
        places = weights_RP.shape[1]
        cumulative_RP = weights_RP.cumsum(-1)
        # Top-p is a share of what top-k has left.
        left_R = cumulative_RP.gather(1, top_k_R[rows, None].clamp(max=places) - 1)[:, 0]
        left_R = torch.where(top_k_R[rows] < vocabulary, left_R, 1.0)
        # A token is kept while those before it have not reached top_p yet.
        kept_RP = cumulative_RP - weights_RP < (top_p_R[rows] * left_R)[:, None]
        kept_RP &= torch.arange(places) < top_k_R[rows, None]
        kept_RP &= weights_RP >= min_p_R[rows, None] * weights_RP[:, :1]
        kept_RP[:, 0] = True
        # What is left out weighs nothing and stands last, so no number falls on it.
        place_R = _draw(weights_RP * kept_RP, drawn_R[rows]).minimum(kept_RP.sum(-1) - 1)
        chosen_R[rows] = tokens_RP.gather(1, place_R[:, None])[:, 0]
    return chosen_R
