"""``POST /v1/embeddings``: texts as vectors."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from gale.engine.request import ContextLengthError, Embeddings, Pooling, PromptError, Reader
from gale.server.caller import engine_of
from gale.server.disconnect import while_wanted
from gale.server.errors import ApiError, invalid, too_long
from gale.server.field_checks import Parameters, Refused
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle
from gale.server.openai_completion_schema import prompt_list
from gale.server.openai_models import require_model

# OpenAI's limits.
MOST_INPUTS = 2048
MOST_TOKENS = 300_000


class EmbeddingRequest(Parameters):
    """The request; ``pooling`` and ``normalize`` are ours."""

    # Of vLLM, Jina, Cohere and Voyage.
    unsupported: ClassVar[Refused] = {
        "add_special_tokens": (True,),
        "chat_template": (),
        "embed_dtype": ("float32",),
        "embedding_type": ("float",),
        "embedding_types": (["float"],),
        "input_type": (),
        "late_chunking": (False,),
        "messages": (),
        "output_dimension": (),
        "output_dtype": ("float",),
        "task": (),
        "truncate": ("NONE",),
        "truncate_prompt_tokens": (),
        "truncation": (False,),
    }
    advice: ClassVar[Mapping[str, str]] = {"output_dimension": "Use 'dimensions'."}

    model: str
    input: Annotated[list[str | list[int]], BeforeValidator(prompt_list(MOST_INPUTS))]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    user: str | None = None


def routes(engine: Reader, lifecycle: Lifecycle) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/embeddings", response_model=None, openapi_extra=request_schema(EmbeddingRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, EmbeddingRequest)
        metered = engine_of(request, engine)
        adapter = require_model(metered, body.model)
        if body.dimensions is not None and body.dimensions > engine.embedding_size:
            raise invalid("dimensions", f"this model's vectors have {engine.embedding_size}")
        texts = await asyncio.to_thread(_tokens, metered, body.input)
        work = metered.embed(
            texts,
            pooling=body.pooling,
            normalise=body.normalize is not False,
            dimensions=body.dimensions,
            adapter=adapter,
        )
        try:
            embeddings = await while_wanted(request.receive, lifecycle, work)
        except PromptError as error:
            raise ApiError(400, error.message, code="invalid_value", param="input") from error
        content = await asyncio.to_thread(_content, body, embeddings)
        return Response(content, media_type="application/json")

    return router


def _tokens(engine: Reader, inputs: list[str | list[int]]) -> list[list[int]]:
    """The inputs as tokens. Raises :class:`ApiError` 400 that names the one at fault."""
    texts: list[list[int]] = []
    total = 0
    for place, text in enumerate(inputs):
        param = "input" if len(inputs) == 1 else f"input[{place}]"
        if not text:
            raise invalid(param, "it must not be empty")
        try:
            ids = engine.encode_text(text) if isinstance(text, str) else text
        except ContextLengthError as error:
            raise too_long(error, param) from error
        if len(ids) > engine.context_length:
            raise too_long(ContextLengthError(len(ids), engine.context_length), param)
        texts.append(ids)
        total += len(ids)
        if total > MOST_TOKENS:
            raise invalid("input", f"all inputs together may have at most {MOST_TOKENS:,} tokens")
    return texts


def _content(body: EmbeddingRequest, embeddings: Embeddings) -> str:
    """The answer. Vector by vector, as writing megabytes of numbers in one go would hold up everybody's streams."""
    items: list[str] = []
    for index, vector in enumerate(embeddings.vectors):
        shown: Any = vector
        if body.encoding_format == "base64":
            shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        items.append(to_json({"object": "embedding", "index": index, "embedding": shown}))
    rest = {"model": body.model, "usage": read_usage(embeddings.prompt_tokens)}
    return f'{{"object":"list","data":[{",".join(items)}],{to_json(rest)[1:]}'


def read_usage(prompt_tokens: int) -> dict[str, int]:
    """Token counts of a request for which nothing was written."""
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
