"""Another engine behind the same interface: any OpenAI-compatible server, by its URL.

Gale's own server, vLLM, SGLang, llama.cpp's ``llama-server`` or a cloud answers; Gale keeps conversations, limits and
API around it. What only some of them have (``/tokenize``, scores with token ids) is used where it is there, and
refused in plain words where it is not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from typing import Any

import structlog

from gale.core.errors import GaleError
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    Event,
    Finished,
    FinishReason,
    PromptError,
    PromptScores,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    Tools,
    Usage,
)
from gale.engine.stop import StopScanner
from gale.engine.upstream_http import MOST_ANSWER_BYTES, UpstreamHttp, content_of, events_of
from gale.engine.upstream_wire import (
    Chunk,
    ToolCalls,
    UpstreamRefusedError,
    estimated_tokens,
    finish_reason,
    logprobs_fields,
    malformed,
    parse_chunk,
    sampling_body,
    token_scores,
    tool_fields,
    wire_messages,
)
from gale.text.template import Message

MOST_EVENT_BYTES = 1024 * 1024
# No token of a vocabulary in use is longer, so a text of n bytes has at least n over this many tokens.
_LONGEST_TOKEN_BYTES = 256
_MOST_KNOWN_TOKENS = 2**18
_END_PATIENCE_S = 0.2
_AT_ONCE = 16

log = structlog.get_logger()


class UpstreamEngine:
    """An OpenAI-compatible server. Implements :class:`gale.engine.request.Engine`; made by :meth:`connect`.

    Closing an answer closes its connection, which is how these servers learn that nobody reads any more.
    """

    def __init__(self, url: str, *, key: str | None) -> None:
        self._http = UpstreamHttp(url, key)
        self._model_id = ""
        self._context_length = 0
        self._owner = ""
        self._adapters: tuple[str, ...] = ()
        self._tokenizes = False
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def connect(
        cls, url: str, *, model: str | None = None, key: str | None = None, context_length: int | None = None
    ) -> UpstreamEngine:
        """Ask the server at ``url`` what it serves. ``model`` may be left out where it serves only one.

        Raises :class:`GaleError` where nobody answers, the model is not there, or neither the server nor
        ``context_length`` says how long its context is.
        """
        engine = cls(url, key=key)
        try:
            engine._look(model, context_length)
        except BaseException:
            engine._http.give_up()
            raise
        return engine

    def _look(self, model: str | None, context_length: int | None) -> None:
        listed = self._http.ask("GET", f"{self._http.base}/models").get("data")
        models = {str(each.get("id")): each for each in listed or [] if isinstance(each, dict)}
        # The others are adapters over one of these, or a Gale's classifier.
        bases = [name for name, card in models.items() if not card.get("parent") and card.get("task") != "moderation"]
        if model is None and len(bases) != 1:
            names = ", ".join(sorted(bases)[:10]) or "none"
            raise GaleError(
                f"{self._http.base} serves {len(bases)} models: {names}.", hint="Choose with --upstream-model."
            )
        self._model_id = model or bases[0]
        self._adapters = tuple(name for name, card in models.items() if card.get("parent") == self._model_id)
        if self._model_id not in models and models:
            log.warning("upstream_does_not_list_model", model=self._model_id)
        card = models.get(self._model_id, {})
        self._owner = str(card.get("owned_by") or "")
        length = context_length or _context_length(card)
        if length is None and self._owner == "llamacpp":
            length = _context_length(
                self._http.ask("GET", f"{self._http.root}/props").get("default_generation_settings")
            )
        if length is None:
            raise GaleError(
                f"{self._http.base} does not say how long the context of {self._model_id} is.",
                hint="Say it with --upstream-context.",
            )
        self._http.context_length = self._context_length = length
        try:
            self._tokenizes = True
            self.encode("a")
        except GaleError:
            self._tokenizes = False
            log.warning("upstream_has_no_tokenizer", using="estimates of prompt lengths", model=self._model_id)

    @property
    def model_id(self) -> str:
        """The name under which the model is served, here and there."""
        return self._model_id

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that the upstream had over the model when it was asked."""
        return self._adapters

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._context_length

    def count_prompt_tokens(
        self, messages: list[Message], tools: Tools | None = None, *, adapter: str | None = None
    ) -> int:
        """Tokens the model would read before answering; an estimate where the upstream does not tokenise, as only
        llama.cpp does for tools."""
        shown = json.dumps(tools.functions, ensure_ascii=False) if tools else ""
        own = estimated_tokens([Message(role="system", content=shown)]) if shown else 0
        if self._tokenizes and self._owner == "llamacpp":
            return len(self._encode_chat(messages, tool_fields(tools, self._owner)))
        if self._tokenizes:
            return len(self._encode_chat(messages, {})) + own
        self._refuse_megabytes(json.dumps(messages, ensure_ascii=False) + shown)
        return estimated_tokens(messages) + own

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode_chat`."""
        return self._encode_chat(messages, {})

    def _encode_chat(self, messages: list[Message], tools: dict[str, Any]) -> list[int]:
        self._refuse_megabytes(json.dumps(messages, ensure_ascii=False) + json.dumps(tools, ensure_ascii=False))
        body = {"messages": wire_messages(messages), **tools}
        if self._owner == "llamacpp":
            text = self._http.ask("POST", f"{self._http.root}/apply-template", body)
            return self._tokens({"content": text.get("prompt"), "add_special": True})
        return self._tokens({"model": self._model_id, **body})

    def encode(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode`."""
        self._refuse_megabytes(text)
        if self._owner == "llamacpp":
            return self._tokens({"content": text, "add_special": False})
        return self._tokens({"model": self._model_id, "prompt": text, "add_special_tokens": False})

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """What one token adds to a text, as the upstream shows it by itself: control tokens always, and the replacement
        character for a part of a character, unless scores have told its bytes.
        """
        if token not in self._bytes:
            self._require_tokenizer()
            self._learn({token: _text_of(self._http.ask("POST", f"{self._http.root}/detokenize", self._one(token)))})
        return self._bytes[token]

    async def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`gale.engine.request.Engine.chat`."""
        body, optional = sampling_body(sampling, self._owner, chat=True)
        if sampling.max_tokens is not None:
            body["max_tokens"] = min(sampling.max_tokens, self._context_length)
        if sampling.logprobs is not None:
            body |= logprobs_fields(sampling.logprobs, self._owner, chat=True)
        body |= {"model": sampling.adapter or self._model_id, "messages": wire_messages(messages)}
        body |= tool_fields(tools, self._owner)
        one_call = tools is not None and not tools.parallel
        events = self._answer(
            "chat/completions", body, optional, sampling, lambda: estimated_tokens(messages), one_call=one_call
        )
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    def complete(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[PromptScores | Event, None]:
        """See :meth:`gale.engine.request.Engine.complete`."""
        if not prompt:
            raise PromptError("A prompt needs at least one token.")
        if min(prompt) < 0:
            raise PromptError("Tokens are numbered from 0.")
        return self._complete(prompt, sampling)

    async def _complete(
        self, prompt: list[int], sampling: SamplingParams
    ) -> AsyncGenerator[PromptScores | Event, None]:
        room = self._context_length - len(prompt)
        if room < (0 if sampling.max_tokens == 0 else 1):
            raise ContextLengthError(len(prompt), self._context_length)
        body, optional = sampling_body(sampling, self._owner, chat=False)
        if sampling.grammar is not None and self._owner == "gale":
            raise UpstreamRefusedError("Gale as an upstream holds conversations to grammars, and not raw completions.")
        body |= {"model": sampling.adapter or self._model_id, "prompt": prompt}
        body["max_tokens"] = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if sampling.logprobs is not None:
            body |= logprobs_fields(sampling.logprobs, self._owner, chat=False)
        if sampling.prompt_logprobs:
            yield await self._prompt_scores(body, len(prompt), sampling.logprobs or 0, optional)
        if sampling.max_tokens == 0:
            yield Finished("length", Usage(len(prompt), 0))
            return
        events = self._answer("completions", body, optional, sampling, lambda: len(prompt))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def close(self) -> None:
        """End all requests and their connections."""
        await self._http.close()

    async def _answer(
        self,
        path: str,
        body: dict[str, Any],
        optional: set[str],
        sampling: SamplingParams,
        prompt_tokens: Callable[[], int],
        *,
        one_call: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """The events of an answer, which ends before a second tool call where there must be but one.

        Usage that the upstream does not tell is estimated: a chunk is taken for a token.
        """
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        chunks = self._chunks(path, body, optional | {"stream_options"})
        stops = StopScanner(sampling.stop)  # of upstreams that ignore stop strings there are enough
        calls = ToolCalls()
        reason: FinishReason | None = None
        usage: Usage | None = None
        pieces, enough = 0, False
        try:
            async for chunk in chunks:
                usage = chunk.counts or usage
                for choice in chunk.choices:
                    if choice.index != 0 or reason is not None:
                        continue
                    pieces += bool(choice.new_text or choice.new_reasoning or choice.new_calls)
                    if choice.new_reasoning:
                        yield ReasoningDelta(choice.new_reasoning)
                    text = stops.push(choice.new_text)
                    if sampling.logprobs is not None and choice.logprobs:
                        scores, known = token_scores(choice.logprobs, sampling.logprobs)
                        await self._learn_tokens(scores, known)
                        for place, score in enumerate(scores):
                            yield TextDelta(text if place == len(scores) - 1 else "", score)
                        text = "" if scores else text
                    if text:
                        yield TextDelta(text)
                    for call in choice.new_calls:
                        if one_call and calls.begins_another(call):  # llama.cpp does not keep a model from it
                            enough = True
                            break
                        yield calls.delta(call)
                    if stops.stopped or enough:
                        reason = "stop"
                    elif choice.finish_reason is not None:
                        reason = finish_reason(choice.finish_reason)
                if stops.stopped or enough:
                    break
        except EngineFailedError:
            if reason is None:  # else all has come but the last lines, with the counts
                raise
        finally:
            if sampling.progress is not None:
                sampling.progress.usage = usage or Usage(prompt_tokens() if pieces else 0, pieces)
            await chunks.aclose()
        if reason is None:
            raise EngineFailedError("The upstream's answer ended without an end.")
        if text := stops.flush():
            yield TextDelta(text)
        yield Finished(reason, usage or Usage(prompt_tokens(), pieces), stops.met)

    async def _chunks(self, path: str, body: dict[str, Any], optional: set[str]) -> AsyncGenerator[Chunk, None]:
        async with self._http.open(path, body, optional) as response:
            events = events_of(response, MOST_EVENT_BYTES)
            async for data in events:
                if data.strip() == "[DONE]":
                    # A response that was read to its end, which is near, leaves its connection for the next.
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_END_PATIENCE_S):
                            await anext(events, None)
                    return
                if data:  # else an empty one
                    yield parse_chunk(data, self._context_length)

    async def _prompt_scores(self, body: dict[str, Any], tokens: int, top: int, optional: set[str]) -> PromptScores:
        """The scores of the prompt, asked for by themselves, so that the answer's text stands alone."""
        async with self._http.open("completions", body | {"echo": True, "max_tokens": 0}, optional) as response:
            choices = parse_chunk(await content_of(response, MOST_ANSWER_BYTES), self._context_length).choices
        scores, known = token_scores((choices[0].logprobs if choices else None) or {"content": []}, top)
        if len(scores) < tokens:
            raise UpstreamRefusedError("The upstream gives no log-probabilities of prompts.")
        await self._learn_tokens(scores[:tokens], known)
        return PromptScores(tuple(scores[:tokens]))

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        self._require_tokenizer()
        tokens = self._http.ask("POST", f"{self._http.root}/tokenize", body).get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise malformed("its tokens are no numbers")
        return tokens

    def _require_tokenizer(self) -> None:
        if not self._tokenizes:
            raise UpstreamRefusedError("The upstream does not tokenise, so only conversations can be sent to it.")

    def _one(self, token: int) -> dict[str, Any]:
        return {"model": self._model_id, "tokens": [token], "skip_special_tokens": False}

    async def _learn_tokens(self, scores: Iterable[Any], known: dict[int, bytes]) -> None:
        """Fetch what these tokens add to a text, so that :meth:`token_bytes` need not wait for it in the event loop."""
        self._learn(known)
        wanted = {score.token for score in scores} | {token for score in scores for token, _ in score.top}
        missing = sorted(wanted - self._bytes.keys()) if self._tokenizes else []
        for low in range(0, len(missing), _AT_ONCE):
            await asyncio.gather(*map(self._fetch_bytes, missing[low : low + _AT_ONCE]))

    async def _fetch_bytes(self, token: int) -> None:
        answer = await self._http.post(f"{self._http.root}/detokenize", self._one(token))
        self._learn({token: _text_of(answer)})

    def _learn(self, known: dict[int, bytes]) -> None:
        if len(self._bytes) > _MOST_KNOWN_TOKENS:
            self._bytes = {}
        self._bytes |= known

    def _refuse_megabytes(self, text: str) -> None:
        least = len(text.encode("utf-8", "replace")) // _LONGEST_TOKEN_BYTES
        if least > self._context_length:
            raise ContextLengthError(least, self._context_length, at_least=True)


def _context_length(card: Any) -> int | None:
    """The context's length as servers tell it; what a model was trained with is not what it is served with."""
    if not isinstance(card, dict):
        return None
    meta = card.get("meta")
    places = (card.get("max_model_len"), card.get("n_ctx"), meta.get("n_ctx") if isinstance(meta, dict) else None)
    for length in (*places, card.get("context_length"), card.get("context_window")):
        if type(length) is int and length > 0:
            return length
    return None


def _text_of(answer: dict[str, Any]) -> bytes:
    """The text in an answer of ``/detokenize``: ``prompt`` in vLLM, ``text`` in SGLang, ``content`` in llama.cpp."""
    for name in ("prompt", "text", "content"):
        if isinstance(text := answer.get(name), str):
            return text.encode("utf-8", "replace")
    raise malformed("it holds no text")
