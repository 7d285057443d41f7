"""A test at every start: are the scores that ``/v1/completions`` echoes those of the model?

Evaluation harnesses measure models through them, and where they are wrong nothing fails: a good model merely looks as
if it guessed.
"""

from __future__ import annotations

import asyncio
import math

from gale.core.errors import GaleError
from gale.engine.request import Engine, SelfTested
from gale.server.openai_completion_schema import CompletionRequest
from gale.server.openai_completions import completed

_TEXT = "The river rises in the hills and goes to the sea. 河流从山中来，流向大海。 1 + 1 = 2"
_MOST_TOKENS = 64
# Of a token on average, in nats: rounding differs between two ways through a model in bf16; a fault is far larger.
TOLERANCE = 0.05


async def check_scores(engine: Engine) -> float | None:
    """How far the two sums are apart, in nats a token; None for an engine whose model is elsewhere.

    Raises :class:`GaleError` where that is more than :data:`TOLERANCE`.
    """
    if not isinstance(engine, SelfTested):
        return None
    tokens = (await asyncio.to_thread(engine.encode, _TEXT))[: min(_MOST_TOKENS, engine.context_length - 1)]
    own = await asyncio.to_thread(engine.log_likelihood, tokens)
    # As lm-evaluation-harness asks.
    asked = {
        "model": engine.model_id,
        "prompt": [tokens],
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
    }
    echoed = (await completed(engine, CompletionRequest.model_validate(asked)))[0]["logprobs"]["token_logprobs"]
    apart = abs(sum(echoed[1 : len(tokens)]) - own) / max(1, len(tokens) - 1)
    if len(echoed) != len(tokens) + 1 or not apart <= TOLERANCE or not math.isfinite(own):
        raise GaleError(
            f"The engine's scores are not its model's: they are {apart:.3f} nats a token apart.",
            hint="Please report this. GALE_KERNELS=off may help meanwhile; --no-self-test serves all the same.",
        )
    return float(apart)
