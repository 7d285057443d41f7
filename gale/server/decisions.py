"""``POST /v1/decisions``: how likely each of some given answers is. The shape is ours.

The prompt is a conversation, which the model is about to answer, or raw text or tokens as in ``/v1/completions``. It is
read once, however many labels there are. ``logprob`` is the natural log-probability of the label's tokens as what the
model writes next; ``probability`` is that among the labels, which sum to 1.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from gale.engine.request import ContextLengthError, PromptError, Reader
from gale.server.caller import engine_of
from gale.server.disconnect import while_wanted
from gale.server.errors import ApiError, invalid, too_long
from gale.server.field_checks import Parameters
from gale.server.json_body import read_json, request_schema
from gale.server.lifecycle import Lifecycle
from gale.server.openai_completion_schema import prompt_list
from gale.server.openai_embeddings import read_usage
from gale.server.openai_models import require_model
from gale.server.openai_request import to_messages
from gale.server.openai_schema import MOST_MESSAGES, ChatMessage

MOST_LABELS = 256
MOST_LABEL_CHARACTERS = 256

Label = Annotated[str, Field(min_length=1, max_length=MOST_LABEL_CHARACTERS)]


class DecisionRequest(Parameters):
    """The request: one of ``messages`` and ``prompt``, and the labels."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    prompt: Annotated[list[str | list[int]], BeforeValidator(prompt_list(1)), Field(max_length=1)] | None = None
    labels: Annotated[list[Label], Field(min_length=1, max_length=MOST_LABELS)]


def routes(engine: Reader, lifecycle: Lifecycle) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["reading"])

    @router.post("/v1/decisions", response_model=None, openapi_extra=request_schema(DecisionRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, DecisionRequest)
        metered = engine_of(request, engine)
        adapter = require_model(metered, body.model)
        if (body.messages is None) == (body.prompt is None):
            raise invalid("prompt", "give either it or 'messages'")
        if len(set(body.labels)) < len(body.labels):
            raise invalid("labels", "no two of them may be equal")
        param = "prompt" if body.messages is None else "messages"
        try:
            prompt = await asyncio.to_thread(_prompt, metered, body, adapter)
            work = metered.decide(prompt, body.labels, adapter=adapter)
            decision = await while_wanted(request.receive, lifecycle, work)
        except ContextLengthError as error:
            raise too_long(error, param) from error
        except PromptError as error:
            raise ApiError(400, error.message, code="invalid_value", param=param) from error
        labels = [
            {"label": label, "probability": probability, "logprob": logprob}
            for label, probability, logprob in zip(body.labels, decision.probabilities, decision.logprobs, strict=True)
        ]
        best = max(range(len(labels)), key=decision.logprobs.__getitem__)
        return JSONResponse(
            {
                "id": f"decision-{secrets.token_hex(12)}",
                "object": "decision",
                "created": int(time.time()),
                "model": body.model,
                "label": body.labels[best],
                "labels": labels,
                "usage": read_usage(decision.prompt_tokens),
            }
        )

    return router


def _prompt(engine: Reader, body: DecisionRequest, adapter: str | None) -> list[int]:
    if body.messages is not None:
        return engine.encode_chat(to_messages(body.messages), adapter=adapter)
    assert body.prompt is not None
    return engine.encode(body.prompt[0]) if isinstance(body.prompt[0], str) else body.prompt[0]
