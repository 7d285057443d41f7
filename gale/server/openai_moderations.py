"""``POST /v1/moderations``: whether texts offend somebody, in OpenAI's shape.

The classifier judges the categories that are its labels and knows nothing of the others. Those are false with a score
of 0, as the shape has no place for "not judged"; but ``category_applied_input_types`` is empty for them, and
``judged_categories`` (ours) names those that mean something.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from gale.assistant.moderation import Judgement, Moderator
from gale.engine.request import Usage
from gale.server.caller import ask_for
from gale.server.disconnect import while_wanted
from gale.server.errors import ApiError
from gale.server.field_checks import Parameters
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import json_response
from gale.server.lifecycle import Lifecycle

MOST_INPUTS = 1024
MOST_CHARACTERS = 200_000  # of all inputs together
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
# What programs written for the vendor's service ask for: they get this server's one classifier, by its own name.
ALIASES = ("omni-moderation-latest",)


def _texts(value: Any) -> Any:
    """Each of the three ways to write the input, as what to judge together: a list of texts for each result."""
    if isinstance(value, str):
        value = [value]
    elif not isinstance(value, list) or not value:
        raise ValueError("it must be a string, or an array of at least one string or content part")
    if len(value) > MOST_INPUTS:
        raise ValueError(f"at most {MOST_INPUTS} inputs are judged at once")
    if all(isinstance(item, str) for item in value):
        texts = [[item] for item in value]
    else:  # content parts make one input
        texts = [[_part(place, item) for place, item in enumerate(value)]]
    for place, text in enumerate(value):
        if text == "":
            raise _problem(f"[{place}]" if len(value) > 1 else "", "it must not be empty")
    if sum(len(text) for parts in texts for text in parts) > MOST_CHARACTERS:
        raise ValueError(f"all inputs together may have at most {MOST_CHARACTERS:,} characters")
    return texts


def _part(place: int, item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "image_url":
        raise _problem(f"[{place}].type", "images are not supported: this classifier reads text only")
    if kind != "text":
        raise _problem(f"[{place}]", "write strings only, or content parts of type 'text' only")
    if not isinstance(item.get("text"), str) or not item["text"]:
        raise _problem(f"[{place}].text", "a text part needs its text as a string that is not empty")
    return str(item["text"])


def _problem(path: str, message: str) -> PydanticCustomError:
    # The message is passed as a value, since braces in a template would be taken for placeholders.
    return PydanticCustomError("content_part", "{message}", {"path": path, "message": message})


_TEXT = {"type": "string", "minLength": 1}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MOST_INPUTS}
_INPUT = {"anyOf": [_TEXT, {**_SEVERAL, "items": _TEXT}, {**_SEVERAL, "items": _PART}]}


class ModerationRequest(Parameters):
    """The request."""

    input: Annotated[list[list[str]], BeforeValidator(_texts), WithJsonSchema(_INPUT)]
    model: str | None = None


def routes(moderator: Moderator, lifecycle: Lifecycle) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"])
    name = moderator.name

    @router.post("/v1/moderations", response_model=None, openapi_extra=request_schema(ModerationRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, ModerationRequest)
        if body.model is not None and body.model not in (name, *ALIASES):
            raise ApiError(
                404,
                f"The model `{body.model[:200]}` does not exist. `{name}` judges texts here.",
                code="model_not_found",
                param="model",
            )
        # No token is shorter than a byte, but each text may have one more.
        most = sum(len(text.encode()) + 1 for parts in body.input for text in parts)
        ticket = await ask_for(request, name, "moderations", most)
        used: Usage | None = None
        try:
            judgements = await while_wanted(request.receive, lifecycle, moderator.judge(body.input))
            used = Usage(sum(judgement.tokens for judgement in judgements), 0)
        finally:
            ticket.end(used)
        judged = [category for category in CATEGORIES if category in judgements[0].scores]
        return await json_response(
            {
                "id": f"modr-{secrets.token_hex(12)}",
                "model": name,
                "results": [_result(each) for each in judgements],
                "judged_categories": judged,
            },
            long=len(judgements) > 1,
        )

    return router


def _result(judgement: Judgement) -> dict[str, Any]:
    return {
        "flagged": bool(judgement.given),
        "categories": {category: category in judgement.given for category in CATEGORIES},
        "category_scores": {category: judgement.scores.get(category, 0.0) for category in CATEGORIES},
        "category_applied_input_types": {
            category: ["text"] if category in judgement.scores else [] for category in CATEGORIES
        },
    }
