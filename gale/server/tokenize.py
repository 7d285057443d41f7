"""``POST /tokenize`` and ``POST /detokenize`` in vLLM's shapes: what a text or a conversation is to the model.

Raw text is read as ``/v1/completions`` reads it: control tokens that are spelled out count as such, and none is added.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field

from gale.engine.request import Engine
from gale.server.caller import engine_of
from gale.server.errors import ApiError
from gale.server.field_checks import INT64, Parameters, Refused, at_most
from gale.server.json_body import read_json, request_schema
from gale.server.openai_models import require_model
from gale.server.openai_request import to_messages
from gale.server.openai_schema import MOST_MESSAGES, ChatMessage

_MOST_TOKENS = 2**18


class TokenizeRequest(Parameters):
    """A text or a conversation."""

    unsupported: ClassVar[Refused] = {
        "add_generation_prompt": (True,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "return_token_strs": (False,),
        "tools": ([],),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # there are none to add or to leave out


class DetokenizeRequest(Parameters):
    """Tokens."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=INT64)]], at_most(_MOST_TOKENS)]


def routes(engine: Engine) -> APIRouter:
    """Both routes."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", openapi_extra=request_schema(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_json(request, TokenizeRequest)
        require_model(engine_of(request, engine), engine.model_id if body.model is None else body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give one of 'prompt' and 'messages'.", code="invalid_value", param="prompt")
        if body.messages is not None:
            tokens = await asyncio.to_thread(engine.encode_chat, to_messages(body.messages))
        else:
            tokens = await asyncio.to_thread(engine.encode, body.prompt or "")
        return {"count": len(tokens), "max_model_len": engine.context_length, "tokens": tokens, "token_strs": None}

    @router.post("/detokenize", openapi_extra=request_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, str]:
        body = await read_json(request, DetokenizeRequest)
        require_model(engine_of(request, engine), engine.model_id if body.model is None else body.model)
        return {"prompt": await asyncio.to_thread(text_of, engine, body.tokens)}

    return router


def text_of(engine: Engine, tokens: list[int]) -> str:
    """The text of ``tokens``, control tokens spelled out; bytes that are no character show as the replacement one."""
    return b"".join(engine.token_bytes(token, control_tokens=True) for token in tokens).decode("utf-8", "replace")
