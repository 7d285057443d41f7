"""A checked chat request as the engine takes it, and what is refused on the way.

A field that we do not know is ignored. A field that we do know and cannot honour is refused: an answer that silently
lacks what was asked for is worse than an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gale.engine.request import Engine, SamplingParams
from gale.server.errors import ApiError
from gale.server.openai_models import require_model
from gale.server.openai_schema import ChatMessage, ChatRequest
from gale.text.template import Message

# Parameters that Gale does not have yet, each with the values that ask for nothing. All may also be null.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def to_engine(request: ChatRequest, engine: Engine) -> tuple[list[Message], SamplingParams]:
    """What to ask of ``engine``. Raises :class:`ApiError` 400, or 404 for another model's name."""
    refuse_unsupported(request.model_extra or {}, _UNSUPPORTED)
    adapter = require_model(engine, request.model)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "it is only allowed together with 'stream': true")
    sampling = SamplingParams(
        max_tokens=_token_limit(request, engine.context_length),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(request.stop),
        adapter=adapter,
    )
    return to_messages(request.messages), sampling


def refuse_unsupported(extra: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises :class:`ApiError` 400 for a field of ``unsupported`` that asks for something: whose value is neither null
    nor one of those listed there."""
    for name, value in extra.items():
        harmless = unsupported.get(name)
        if harmless is None or value is None:
            continue
        # By type as well: True equals 1 in Python and is no number in JSON.
        if not any(type(value) is type(allowed) and value == allowed for allowed in harmless):
            raise ApiError(
                400,
                f"The parameter '{name}' with this value is not supported.",
                code="unsupported_parameter",
                param=name,
            )


def _token_limit(request: ChatRequest, context_length: int) -> int | None:
    """The smaller surprise: more than the model could ever write is refused, as OpenAI does. What merely does not
    fit beside this prompt ends with ``finish_reason`` "length"."""
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens", "it differs from 'max_completion_tokens'; give one of them")
    name, limit = ("max_completion_tokens", new) if new is not None else ("max_tokens", old)
    if limit is not None and limit > context_length:
        raise invalid(name, f"this model writes at most {context_length} tokens")
    return limit


def to_messages(messages: list[ChatMessage]) -> list[Message]:
    """Messages as the engine takes them. Raises :class:`ApiError` 400."""
    converted: list[Message] = []
    calls: set[str] = set()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise ApiError(
                400,
                f"Missing required parameter: '{where}.content'.",
                code="missing_required_parameter",
                param=f"{where}.content",
            )
        if message.tool_calls and message.role != "assistant":
            raise invalid(f"{where}.tool_calls", "only an assistant's message may have it")
        if message.role == "tool" and message.tool_call_id not in calls:
            raise invalid(f"{where}.tool_call_id", "it must name a call of an earlier assistant message")
        calls.update(call.id for call in message.tool_calls or [])
        role = "system" if message.role == "developer" else message.role
        plain = Message(role=role, content=message.content or "")
        if message.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        converted.append(plain)
    return converted


def invalid(param: str, reason: str) -> ApiError:
    """The error for a value that cannot be used."""
    return ApiError(400, f"Invalid '{param}': {reason}.", code="invalid_value", param=param)
