"""Choosing the next token from its scores.

Every request has a random generator of its own, so its answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gale.engine.request import SamplingParams

# Enough for top-p in nearly every case; sorting a whole vocabulary for each token would cost milliseconds.
_SHORT_LIST = 256


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    def choose(self, logits_V: Tensor) -> int:
        """One token id from fp32 scores [V]."""
        if self._params.temperature == 0:
            return int(logits_V.argmax())
        # Divided after subtracting the maximum, so that a tiny temperature cannot overflow.
        probabilities_V = torch.softmax((logits_V - logits_V.max()) / self._params.temperature, dim=-1)
        kept_P, ids_P = _nucleus(probabilities_V, self._params.top_p)
        cumulative_P = kept_P.double().cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative_P[-1]
        index = int(torch.searchsorted(cumulative_P, drawn, right=True))
        return int(ids_P[min(index, len(ids_P) - 1)])


def _nucleus(probabilities_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens that together reach ``top_p`` (Holtzman et al. 2020), at least one, best first."""
    if top_p >= 1:
        return probabilities_V, torch.arange(len(probabilities_V))
    best_P, ids_P = probabilities_V.topk(min(_SHORT_LIST, len(probabilities_V)))
    if float(best_P.sum()) < top_p:
        best_P, ids_P = probabilities_V.sort(descending=True)
    # A token is kept while those before it have not reached top_p yet.
    count = max(1, int((best_P.cumsum(0) - best_P < top_p).sum()))
    return best_P[:count], ids_P[:count]
