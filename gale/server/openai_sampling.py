"""How an answer is sampled, as chat and completions both take it: OpenAI's fields, and beside them vLLM's names for
what OpenAI lacks (``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

from gale.engine.request import SamplingParams
from gale.server.field_checks import INT64, Parameters, at_most

MOST_BIASES = 1024
MOST_STOP_TOKENS = 128


def _positive_zero(value: float | None) -> float | None:
    if value is not None and math.copysign(1, value) < 0:
        raise ValueError("must not be negative")
    return value


Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), AfterValidator(_positive_zero)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-INT64, lt=INT64)]
TokenId = Annotated[int, Field(ge=0, lt=INT64)]
# JSON has no other keys than strings; one spelling for each number, so that no token is named twice.
TokenKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,17})$")]


class SamplingFields(Parameters):
    """The fields themselves; all may be null."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenKey, Bias] | None, at_most(MOST_BIASES)] = None
    seed: Seed | None = None
    stop_token_ids: Annotated[list[TokenId] | None, at_most(MOST_STOP_TOKENS)] = None

    def sampling(self, *, stop: list[str], max_tokens: int | None, logprobs: int | None, **more: Any) -> SamplingParams:
        """What the engine is told; a field that is null or missing means what OpenAI says it does."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),  # vLLM has -1 for all
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            **more,
        )


def seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of one of several choices: with one seed for all they would all be alike."""
    return None if seed is None else seed + choice
