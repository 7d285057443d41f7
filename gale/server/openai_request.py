"""A checked chat request as the engine takes it, and what is refused on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gale.engine.request import Engine, SamplingParams, Tools
from gale.server.errors import ApiError, invalid
from gale.server.openai_logprobs import MOST_SCORES
from gale.server.openai_models import require_model
from gale.server.openai_sampling import seed_of
from gale.server.openai_schema import ChatMessage, ChatRequest
from gale.text.template import Message


@dataclass(frozen=True, slots=True)
class Asked:
    """What to ask of the engine: one answer with ``each`` of these.

    ``grammar_field`` is the field of the body that is at fault where the engine cannot use the grammar. With ``as_ids``
    tokens in log-probabilities stand as ids.
    """

    messages: list[Message]
    each: list[SamplingParams]
    tools: Tools | None
    grammar_field: str
    as_ids: bool


def to_engine(request: ChatRequest, engine: Engine) -> Asked:
    """What to ask of ``engine``. Raises :class:`ApiError` 400, or 404 for another model's name."""
    adapter = require_model(engine, request.model)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "it is only allowed together with 'stream': true")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "it is only allowed together with 'logprobs': true")
    tools = request.callable_tools()
    field, grammar = request.grammar() or ("tools", None)
    sampling = request.sampling(
        stop=request.stop,
        max_tokens=_token_limit(request, engine.context_length),
        adapter=adapter,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=grammar,
    )
    choices = request.n or 1
    limit = engine.context_length if sampling.max_tokens is None else sampling.max_tokens
    if request.logprobs and choices * limit * (1 + (request.top_logprobs or 0)) > MOST_SCORES:
        raise invalid("logprobs", f"this may need more than {MOST_SCORES:,} scores; ask for fewer tokens or choices")
    each = [replace(sampling, seed=seed_of(request.seed, choice)) for choice in range(choices)]
    return Asked(to_messages(request.messages), each, tools, field, bool(request.return_tokens_as_token_ids))


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
    calls: dict[str, str] = {}
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
        calls.update({call.id: call.function.name for call in message.tool_calls or []})
        role = "system" if message.role == "developer" else message.role
        plain = Message(role=role, content=message.content or "")
        if message.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.tool_call_id in calls:
            plain["tool_call_id"], plain["name"] = message.tool_call_id, calls[message.tool_call_id]
        if message.reasoning_content:
            plain["reasoning_content"] = message.reasoning_content
        converted.append(plain)
    return converted
