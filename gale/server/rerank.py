"""``POST /v1/rerank``: documents by how well they answer a query, in the shape of Jina, Cohere and vLLM.

Ours are ``method`` and ``prompt``, see :mod:`gale.assistant.rerank`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from gale.assistant.rerank import PROMPT, DocumentLengthError, Method, rerank
from gale.engine.request import Reader
from gale.server.caller import engine_of
from gale.server.disconnect import while_wanted
from gale.server.errors import invalid, too_long
from gale.server.field_checks import Parameters, Refused
from gale.server.json_body import read_json, request_schema
from gale.server.lifecycle import Lifecycle
from gale.server.openai_embeddings import read_usage
from gale.server.openai_models import require_model

MOST_DOCUMENTS = 1024


def _documents(value: Any) -> Any:
    """Documents may be strings or objects with a text."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_DOCUMENTS:
        raise ValueError(f"it must be a list of 1 to {MOST_DOCUMENTS} documents")
    return [each.get("text") if isinstance(each, dict) else each for each in value]


class RerankRequest(Parameters):
    """The request."""

    # Of vLLM, Jina, Cohere and Voyage.
    unsupported: ClassVar[Refused] = {
        "max_chunks_per_doc": (),
        "max_doc_length": (),
        "max_query_length": (),
        "max_tokens_per_doc": (),
        "rank_fields": (["text"],),
        "return_embeddings": (False,),
        "top_k": (),
        "truncate": ("NONE",),
        "truncate_prompt_tokens": (),
        "truncation": (False,),
    }
    advice: ClassVar[Mapping[str, str]] = {"top_k": "Use 'top_n'."}

    model: str
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_documents)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    method: Method | None = None
    prompt: str | None = None


def routes(engine: Reader, lifecycle: Lifecycle) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["reading"])

    @router.post("/v1/rerank", response_model=None, openapi_extra=request_schema(RerankRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, RerankRequest)
        metered = engine_of(request, engine)
        adapter = require_model(metered, body.model)
        prompt = PROMPT if body.prompt is None else body.prompt
        if "{query}" not in prompt or "{document}" not in prompt:
            raise invalid("prompt", "it must have the places {query} and {document}")
        work = rerank(metered, body.query, body.documents, method=body.method or "yes", prompt=prompt, adapter=adapter)
        try:
            ranking = await while_wanted(request.receive, lifecycle, work)
        except DocumentLengthError as error:
            raise too_long(error, "query" if error.index is None else f"documents[{error.index}]") from error
        results: list[dict[str, Any]] = []
        for index, score in ranking.scores[: body.top_n]:
            results.append({"index": index, "relevance_score": score})
            if body.return_documents is not False:
                results[-1]["document"] = {"text": body.documents[index]}
        return JSONResponse(
            {
                "id": f"rerank-{secrets.token_hex(12)}",
                "model": body.model,
                "results": results,
                "usage": read_usage(ranking.prompt_tokens),
            }
        )

    return router
