"""What travels to an OpenAI-compatible server and back: the request's body, the stream's chunks, its errors.

The shapes are those of the OpenAI API, of vLLM's and SGLang's ``protocol.py`` and of llama.cpp's server's README.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gale.core.errors import GaleError
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    EngineOverloadedError,
    FinishReason,
    Grammar,
    GrammarError,
    SamplingParams,
    TokenScore,
    ToolCallDelta,
    Tools,
    Usage,
)
from gale.text.template import Message

# Servers whose own defaults for these are no defaults of ours, and who take the names: what "not asked for" is, said.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_LOCAL_SERVERS = ("vllm", "sglang", "llamacpp")
_OTHER_NAMES = {"llamacpp": {"repetition_penalty": "repeat_penalty"}}
# Of SamplingParams, what may be passed on as it is. Everything else is refused where a caller asks for it.
_SAME_NAME = ("seed", "frequency_penalty", "presence_penalty", "logit_bias", "stop_token_ids", "priority", *_NEUTRAL)
# What some would leave aside without a word.
_ONLY_FOR = {"priority": ("vllm", "sglang"), "stop_token_ids": ("vllm", "sglang", "gale")}
_MAPPED = {"max_tokens", "temperature", "top_p", "stop", "logprobs", "prompt_logprobs", "adapter", "grammar"}

# How servers put into words that a prompt is too long: the context's length, and the prompt's, the surest first.
_LIMIT = re.compile(r"context (?:length|size)\D{0,40}(\d+)", re.IGNORECASE)
_ASKED = (
    re.compile(r"(\d+) (?:in the messages|tokens from the input|input tokens)"),
    re.compile(r"(?:prompt (?:contains|has)|resulted in|input \(|request(?:ed)?)\D{0,20}(\d+)"),
)
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
_OVERLOADED = ("engine_overloaded", "server_overloaded")
_MOST_QUOTED = 500


class UpstreamRefusedError(GaleError):
    """The upstream does not take this request, or cannot give what is asked for."""


def sampling_body(sampling: SamplingParams, owner: str, *, chat: bool) -> tuple[dict[str, Any], set[str]]:
    """The fields for ``sampling``, and which of them nobody asked for, so that they may be left out if refused.

    ``owner`` is who runs the server, as ``/v1/models`` says in ``owned_by``. Temperature and top-p are always said,
    since many servers have other defaults. Raises :class:`UpstreamRefusedError` for what has no name in this API.
    """
    body: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    optional = {name for name, value in body.items() if value == 1}
    if owner in _LOCAL_SERVERS:
        body |= _NEUTRAL
        optional |= _NEUTRAL.keys()
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in _MAPPED or not field.compare or value == default:  # what is not compared stays here
            continue
        if field.name not in _SAME_NAME or owner not in _ONLY_FOR.get(field.name, (owner,)):
            raise UpstreamRefusedError(f"'{field.name}' cannot be passed on to this upstream.")
        if field.name == "logit_bias":
            value = {str(token): bias for token, bias in value}
        body[field.name] = list(value) if isinstance(value, tuple) else value
        optional.discard(field.name)
    if sampling.grammar is not None:
        body |= _grammar_fields(sampling.grammar, owner, chat)
    names = _OTHER_NAMES.get(owner, {})
    return {names.get(name, name): value for name, value in body.items()}, {names.get(name, name) for name in optional}


def logprobs_fields(top: int, owner: str, *, chat: bool) -> dict[str, Any]:
    """The fields that ask for scores with the ``top`` best tokens beside each; llama.cpp gives none for no best."""
    top = max(1, top) if owner == "llamacpp" else top
    asked = {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    return asked | {"return_tokens_as_token_ids": True}


def _grammar_fields(grammar: Grammar, owner: str, chat: bool) -> dict[str, Any]:
    if grammar.kind == "json_schema":
        try:
            schema = json.loads(str(grammar.value))
        except (ValueError, RecursionError) as error:
            raise GrammarError("The schema is not JSON.") from error
        if owner == "llamacpp" and not chat:  # whose completions leave a response_format aside without a word
            return {"json_schema": schema}
        form = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": form}}
    if grammar.kind == "regex" and owner == "sglang":
        return {"regex": grammar.value}
    if grammar.kind == "choice" and owner == "llamacpp":  # in its own notation, GBNF
        return {"grammar": "root ::= " + " | ".join(json.dumps(each, ensure_ascii=False) for each in grammar.value)}
    if grammar.kind != "spans" and owner in ("vllm", "gale"):
        value = grammar.value if isinstance(grammar.value, str) else list(grammar.value)
        return {"structured_outputs": {"grammar" if grammar.kind == "lark" else grammar.kind: value}}
    raise UpstreamRefusedError(f"A grammar of the kind '{grammar.kind}' cannot be passed on to this upstream.")


def tool_fields(tools: Tools | None, owner: str) -> dict[str, Any]:
    """The fields for ``tools``. Those that must not be called are left out: not every server can forbid one."""
    if tools is None:
        return {}
    named = [{"type": "function", "function": function} for function in tools.callable]
    choice: Any = "required" if tools.required else "auto"
    if tools.required and len(named) == 1 and owner != "llamacpp":  # which would take a name for "auto"
        choice = {"type": "function", "function": {"name": tools.callable[0]["name"]}}
    return {"tools": named, "tool_choice": choice} | ({} if tools.parallel else {"parallel_tool_calls": False})


def wire_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the API wants them: each tool's answer names the call it answers, in the order of the calls."""
    wire, open_calls = [], iter(())
    for message in messages:
        sent: dict[str, Any] = dict(message)
        if calls := sent.get("tool_calls"):
            open_calls = iter([call.get("id") for call in calls])
        elif sent["role"] == "tool" and "tool_call_id" not in sent:
            sent["tool_call_id"] = next(open_calls, None)
        if sent["role"] == "tool":
            sent.pop("name", None)  # the function's, which the API takes from the call
        wire.append(sent)
    return wire


def estimated_tokens(messages: list[Message]) -> int:
    """Tokens of a conversation where nobody can count them: three bytes each, which is rather too many than too few."""
    return sum(len(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")) // 3 for message in messages)


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Function(_Lenient):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(_Lenient):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class _Delta(_Lenient):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same in newer vLLM
    tool_calls: list[_ToolCall] | None = None


class _Choice(_Lenient):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def new_text(self) -> str:
        return self.text or (self.delta and self.delta.content) or ""

    @property
    def new_reasoning(self) -> str:
        return (self.delta and (self.delta.reasoning_content or self.delta.reasoning)) or ""

    @property
    def new_calls(self) -> list[_ToolCall]:
        return (self.delta and self.delta.tool_calls) or []


class _Cached(_Lenient):
    cached_tokens: int | None = None


class _Usage(_Lenient):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class Chunk(_Lenient):
    """One event of a stream, or a whole answer; :attr:`choices` is empty in the one with the usage."""

    choices: list[_Choice] = []
    usage: _Usage | None = None

    @property
    def counts(self) -> Usage | None:
        """The usage, where this chunk has it."""
        if self.usage is None or self.usage.completion_tokens is None:
            return None
        cached = self.usage.prompt_tokens_details and self.usage.prompt_tokens_details.cached_tokens
        return Usage(self.usage.prompt_tokens, self.usage.completion_tokens, cached or 0)


class ToolCalls:
    """The calls of one answer, which servers number and name in ways of their own."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def begins_another(self, call: _ToolCall) -> bool:
        """Whether this is the first part of a call beside one that has begun."""
        return bool(self._places) and call.index not in self._places

    def delta(self, call: _ToolCall) -> ToolCallDelta:
        """The next part of a call. Raises :class:`EngineFailedError` for a call of nothing."""
        arguments = call.function.arguments or ""
        if call.index in self._places:
            return ToolCallDelta(self._places[call.index], None, None, arguments)
        if not call.function.name:
            raise malformed("a tool call has no name")
        place = self._places[call.index] = len(self._places)
        return ToolCallDelta(place, call.id or f"call_{secrets.token_hex(12)}", call.function.name, arguments)


def parse_json(data: str | bytes) -> dict[str, Any]:
    """A JSON object from the upstream. Raises :class:`EngineFailedError` for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed("what it sent is not JSON") from error
    if not isinstance(value, dict):
        raise malformed("what it sent is no JSON object")
    return value


def parse_chunk(data: str | bytes, context_length: int) -> Chunk:
    """See :class:`Chunk`. Raises the error that the upstream reports in place of a chunk."""
    value = parse_json(data)
    if value.get("error") is not None or value.get("object") == "error":
        raise as_error(_code(value), value, context_length)
    try:
        return Chunk.model_validate(value)
    except ValidationError as error:
        raise malformed(f"a chunk has a wrong {'.'.join(map(str, error.errors()[0]['loc']))}") from error


def finish_reason(reason: str) -> FinishReason:
    """How an answer ended. Raises for an end that is none."""
    match reason:
        case "length":
            return "length"
        case "content_filter":
            raise UpstreamRefusedError("The upstream has withheld the rest of this answer (content_filter).")
        case "abort" | "error":
            raise EngineFailedError("The upstream gave up on the answer.")
        case _:
            return "stop"


def token_scores(logprobs: dict[str, Any], top: int) -> tuple[list[TokenScore], dict[int, bytes]]:
    """The scores in a choice's ``logprobs``, and the bytes of tokens where they stand beside them.

    Takes the parallel lists of the completions API, with ``token_id:N`` in place of texts, and the list ``content`` of
    the chat API, with such texts or llama.cpp's ``id``. Raises :class:`UpstreamRefusedError` for tokens without ids.
    """
    known: dict[int, bytes] = {}

    def token_id(token: Any, entry: dict[str, Any]) -> int:
        number = entry.get("id")
        if not isinstance(number, int):
            found = re.fullmatch(r"token_id:(\d+)", str(token))
            if found is None:
                raise UpstreamRefusedError("The upstream names tokens by their text only, so their scores have no ids.")
            number = int(found[1])
        if isinstance(data := entry.get("bytes"), list):
            known[number] = bytes(data)
        return number

    def score(token: int, logprob: float | None, best: list[tuple[int, float]]) -> TokenScore:
        best.sort(key=lambda item: -item[1])
        return TokenScore(token, logprob, tuple(best[:top]))

    try:
        scores: list[TokenScore] = []
        if isinstance(entries := logprobs.get("content"), list):
            for entry in entries:
                best = [(token_id(each.get("token"), each), float(each["logprob"])) for each in entry["top_logprobs"]]
                scores.append(score(token_id(entry.get("token"), entry), float(entry["logprob"]), best))
            return scores, known
        tokens = logprobs["tokens"]
        tops = logprobs.get("top_logprobs") or [None] * len(tokens)
        for token, logprob, beside in zip(tokens, logprobs["token_logprobs"], tops, strict=True):
            best = [(token_id(text, {}), float(value)) for text, value in (beside or {}).items()]
            scores.append(score(token_id(token, {}), logprob if logprob is None else float(logprob), best))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed("its log-probabilities have another form") from error
    return scores, known


def as_error(status: int, body: Any, context_length: int) -> GaleError:
    """What a refusal of the upstream means to a caller of the engine."""
    details = _details(body)
    message, code = _message(body), str(details.get("code") or details.get("type") or "")
    if status in (401, 403):  # without the message, which may quote the key
        return EngineFailedError("The upstream does not accept Gale's key.", hint="Check --upstream-key-env.")
    if status == 404:
        return EngineFailedError(f"The upstream does not know this model or address: {message}")
    if status == 429 or details.get("code") in _OVERLOADED:
        return EngineOverloadedError(f"The upstream is overloaded: {message}")
    if status >= 500:
        return EngineFailedError(f"The upstream failed ({status}): {message}")
    asked, limit = details.get("n_prompt_tokens"), details.get("n_ctx")
    if not isinstance(asked, int):
        asked = next((int(found[1]) for pattern in _ASKED if (found := pattern.search(message))), None)
    if not isinstance(limit, int):
        limit = int(found[1]) if (found := _LIMIT.search(message)) else None
    if code in _TOO_LONG or details.get("type") in _TOO_LONG or (asked is not None and limit is not None):
        limit = limit or context_length
        return ContextLengthError(limit if asked is None else asked, limit)
    return UpstreamRefusedError(f"The upstream refuses this request: {message}")


def refused_fields(status: int, body: Any, optional: set[str]) -> set[str]:
    """Those of ``optional`` that the upstream names as what is wrong with the request."""
    if status not in (400, 422):
        return set()
    text = f"{_details(body).get('param')} {_message(body, most=10_000)}"
    return {name for name in optional if re.search(rf"\b{name}\b", text)}


def malformed(what: str) -> EngineFailedError:
    """The error for an answer that cannot be read."""
    return EngineFailedError(f"The upstream's answer cannot be read: {what}.")


def _details(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        return {}
    error = body.get("error", body)
    return error if isinstance(error, dict) else {}


def _code(body: dict[str, Any]) -> int:
    """The HTTP status that an error within a stream stands for."""
    code = _details(body).get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 400 if code in _TOO_LONG else 500


def _message(body: Any, most: int = _MOST_QUOTED) -> str:
    details = _details(body)
    message = details.get("message") or details.get("detail")
    if message is None:
        message = body.get("error") if isinstance(body, dict) else body
    text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    return " ".join(text.split())[:most] or "it does not say why"
