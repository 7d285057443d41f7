"""What changes the scores before a token is chosen: a bias, and penalties for what has been said already.

First ``logit_bias`` is added. Then ``repetition_penalty`` divides the positive and multiplies the negative scores of
all tokens of prompt and answer (Keskar et al. 2019, as in Hugging Face transformers). Last, as OpenAI defines them,
``frequency_penalty`` is taken off for each time that the answer has a token, ``presence_penalty`` once.

The cost is that of the different tokens seen, not of the vocabulary. Shape suffixes: V vocabulary, P tokens seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gale.engine.request import SamplingParams

_FIRST_CAPACITY = 64


class Penalties:
    """The changes that ``params`` ask for, and the tokens they depend on."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self._repetition = float(params.repetition_penalty)
        self._frequency, self._presence = float(params.frequency_penalty), float(params.presence_penalty)
        self._bias_ids = torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([float(bias) for _, bias in params.logit_bias])
        seen = list(dict.fromkeys(prompt)) if self._repetition != 1 else []
        self._places = {token: place for place, token in enumerate(seen)}
        self._ids_P = torch.tensor(seen, dtype=torch.int64)
        self._counts_P = torch.zeros(len(seen))  # in the answer

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether ``params`` ask for anything."""
        return bool(
            params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty or params.logit_bias
        )

    def note(self, token: int) -> None:
        """Count one more token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place >= len(self._ids_P):
            capacity = max(_FIRST_CAPACITY, 2 * place)
            self._ids_P = torch.cat((self._ids_P, torch.zeros(capacity - place, dtype=torch.int64)))
            self._counts_P = torch.cat((self._counts_P, torch.zeros(capacity - place)))
        self._ids_P[place] = token
        self._counts_P[place] += 1

    def apply(self, logits_V: Tensor) -> None:
        """Change fp32 scores in place."""
        if len(self._bias):
            logits_V[self._bias_ids] += self._bias
        ids_P, counts_P = self._ids_P[: len(self._places)], self._counts_P[: len(self._places)]
        scores_P = logits_V[ids_P]
        if self._repetition != 1:
            scores_P = torch.where(scores_P < 0, scores_P * self._repetition, scores_P / self._repetition)
        scores_P -= self._frequency * counts_P + self._presence * (counts_P > 0)
        logits_V[ids_P] = scores_P
