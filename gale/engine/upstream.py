"""Another engine behind the same interface: any OpenAI-compatible server, by its URL.

Gale's own server, vLLM, SGLang, llama.cpp's ``llama-server`` or a cloud answers; Gale keeps conversations, limits and
API around it. What only some of them have (``/tokenize``, scores with token ids) is used where it is there, and
refused in plain words where it is not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import structlog

from gale.core.errors import GaleError
from gale.core.settings import settings
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    Event,
    Finished,
    FinishReason,
    PromptError,
    PromptScores,
    SamplingParams,
    TextDelta,
    Tools,
    Usage,
)
from gale.engine.stop import StopScanner
from gale.engine.upstream_wire import (
    Chunk,
    UpstreamRefusedError,
    as_error,
    estimated_tokens,
    finish_reason,
    malformed,
    parse_chunk,
    parse_json,
    refused_fields,
    sampling_body,
    token_scores,
    wire_messages,
)
from gale.text.template import Message

RETRIES = 2
MOST_EVENT_BYTES = 1024 * 1024
_FIRST_PAUSE_S = 0.25
_MOST_ANSWER_BYTES = 64 * 1024 * 1024
_MOST_ERROR_BYTES = 64 * 1024
_PASSING = (502, 503, 504)  # statuses that may be gone in a moment
# No token of a vocabulary in use is longer, so a text of n bytes has at least n over this many tokens.
_LONGEST_TOKEN_BYTES = 256
_MOST_KNOWN_TOKENS = 2**18
_AT_ONCE = 16

log = structlog.get_logger()


class UpstreamEngine:
    """An OpenAI-compatible server. Implements :class:`gale.engine.request.Engine`; made by :meth:`connect`.

    Requests are tried again, up to :data:`RETRIES` times, while nothing of the answer has come and the fault may pass.
    Closing an answer closes its connection, which is how these servers learn that nobody reads any more.
    """

    def __init__(self, url: str, *, key: str | None) -> None:
        self._base, self._root = _addresses(url)
        headers = {"accept-encoding": "identity"}  # so that what is measured is what is held in memory
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        patience = httpx2.Timeout(settings().upstream_read_s, connect=settings().upstream_connect_s)
        # As many connections as requests: how many there may be is the server's business, on either side.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx2.AsyncClient(headers=headers, timeout=patience, limits=limits)
        self._blocking = httpx2.Client(headers=headers, timeout=patience, limits=limits)
        self._model_id = ""
        self._context_length = 0
        self._owner = ""
        self._tokenizes = False
        self._bytes: dict[int, bytes] = {}
        self._unwanted: set[str] = set()  # optional fields that this upstream has refused before

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
            engine._blocking.close()
            raise
        return engine

    def _look(self, model: str | None, context_length: int | None) -> None:
        listed = self._ask("GET", f"{self._base}/models").get("data")
        models = {str(each.get("id")): each for each in listed or [] if isinstance(each, dict)}
        if model is None and len(models) != 1:
            names = ", ".join(sorted(models)[:10]) or "none"
            raise GaleError(f"{self._base} serves {len(models)} models: {names}.", hint="Choose with --upstream-model.")
        self._model_id = model or next(iter(models))
        if self._model_id not in models and models:
            log.warning("upstream_does_not_list_model", model=self._model_id)
        card = models.get(self._model_id, {})
        self._owner = str(card.get("owned_by") or "")
        length = context_length or _context_length(card)
        if length is None and self._owner == "llamacpp":
            length = _context_length(self._ask("GET", f"{self._root}/props").get("default_generation_settings"))
        if length is None:
            raise GaleError(
                f"{self._base} does not say how long the context of {self._model_id} is.",
                hint="Say it with --upstream-context.",
            )
        self._context_length = length
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
        """None: they are for a model in this process."""
        return ()

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._context_length

    def count_prompt_tokens(self, messages: list[Message]) -> int:
        """Tokens the model would read before answering; an estimate where the upstream does not tokenise."""
        if self._tokenizes:
            return len(self.encode_chat(messages))
        self._refuse_megabytes(json.dumps(messages, ensure_ascii=False))
        return estimated_tokens(messages)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode_chat`."""
        self._refuse_megabytes(json.dumps(messages, ensure_ascii=False))
        if self._owner == "llamacpp":
            text = self._ask("POST", f"{self._root}/apply-template", {"messages": wire_messages(messages)})
            return self._tokens({"content": text.get("prompt"), "add_special": True})
        return self._tokens({"model": self._model_id, "messages": wire_messages(messages)})

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
            self._learn({token: _text_of(self._ask("POST", f"{self._root}/detokenize", self._one(token)))})
        return self._bytes[token]

    async def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`gale.engine.request.Engine.chat`. Tools are refused: they are not passed on yet."""
        if tools is not None:
            raise UpstreamRefusedError("Tools cannot be passed on to an upstream.")
        body, optional = sampling_body(sampling, self._owner)
        if sampling.max_tokens is not None:
            body["max_tokens"] = min(sampling.max_tokens, self._context_length)
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        body |= {"model": self._model_id, "messages": wire_messages(messages)}
        events = self._answer("chat/completions", body, optional, sampling, lambda: estimated_tokens(messages))
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
        body, optional = sampling_body(sampling, self._owner)
        body |= {"model": self._model_id, "prompt": prompt}
        body["max_tokens"] = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
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
        await self._http.aclose()
        self._blocking.close()

    async def _answer(
        self,
        path: str,
        body: dict[str, Any],
        optional: set[str],
        sampling: SamplingParams,
        prompt_tokens: Callable[[], int],
    ) -> AsyncGenerator[Event, None]:
        """The events of an answer. Usage that the upstream does not tell is estimated: a chunk is taken for a token."""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        chunks = self._chunks(path, body, optional | {"stream_options"})
        stops = StopScanner(sampling.stop)  # of upstreams that ignore stop strings there are enough
        reason: FinishReason | None = None
        usage: Usage | None = None
        pieces = 0
        try:
            async for chunk in chunks:
                if chunk.usage is not None and chunk.usage.completion_tokens is not None:
                    usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
                for choice in chunk.choices:
                    if choice.index != 0 or reason is not None:
                        continue
                    pieces += bool(choice.new_text)
                    text = stops.push(choice.new_text)
                    if sampling.logprobs is not None and choice.logprobs:
                        scores, known = token_scores(choice.logprobs, sampling.logprobs)
                        await self._learn_tokens(scores, known)
                        for place, score in enumerate(scores):
                            yield TextDelta(text if place == len(scores) - 1 else "", score)
                        text = "" if scores else text
                    if text:
                        yield TextDelta(text)
                    if stops.stopped:
                        reason = "stop"
                    elif choice.finish_reason is not None:
                        reason = finish_reason(choice.finish_reason)
                if stops.stopped:
                    break
        except EngineFailedError:
            if reason is None:  # else all has come but the last lines, with the counts
                raise
        finally:
            await chunks.aclose()
        if reason is None:
            raise EngineFailedError("The upstream's answer ended without an end.")
        if text := stops.flush():
            yield TextDelta(text)
        yield Finished(reason, usage or Usage(prompt_tokens(), pieces))

    async def _chunks(self, path: str, body: dict[str, Any], optional: set[str]) -> AsyncGenerator[Chunk, None]:
        async with self._open(path, body, optional) as response:
            async for event in httpx2.EventSource(response, MOST_EVENT_BYTES):
                if event.data.strip() == "[DONE]":
                    return
                if event.data:  # else an id or a reconnection time by itself
                    yield parse_chunk(event.data, self._context_length)

    async def _prompt_scores(self, body: dict[str, Any], tokens: int, top: int, optional: set[str]) -> PromptScores:
        """The scores of the prompt, asked for by themselves, so that the answer's text stands alone."""
        async with self._open("completions", body | {"echo": True, "max_tokens": 0}, optional) as response:
            choices = parse_chunk(await _content(response, _MOST_ANSWER_BYTES), self._context_length).choices
        scores, known = token_scores((choices[0].logprobs if choices else None) or {"content": []}, top)
        if len(scores) < tokens:
            raise UpstreamRefusedError("The upstream gives no log-probabilities of prompts.")
        await self._learn_tokens(scores[:tokens], known)
        return PromptScores(tuple(scores[:tokens]))

    @asynccontextmanager
    async def _open(self, path: str, body: dict[str, Any], optional: set[str]) -> AsyncIterator[httpx2.Response]:
        """A response of status 2xx whose content is still to come. Faults of the connection, then and later, are raised
        as :class:`EngineFailedError`, refusals as :func:`as_error` says.
        """
        failures = 0
        while True:
            sent = {name: value for name, value in body.items() if name not in self._unwanted & optional}
            try:
                request = self._http.build_request("POST", f"{self._base}/{path}", json=sent)
                response = await self._http.send(request, stream=True)
            except httpx2.TransportError as error:
                if failures == RETRIES or isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
                    raise _failed(error) from error
            else:
                try:
                    if response.is_success:
                        yield response
                        return
                    said = _parsed(await _content(response, _MOST_ERROR_BYTES, cut=True))
                except httpx2.TransportError as error:
                    raise _failed(error) from error
                finally:
                    await response.aclose()
                refused = refused_fields(response.status_code, said, optional) - self._unwanted
                if refused:
                    self._unwanted |= refused
                    log.info("upstream_refused_defaults", fields=sorted(refused))
                    continue
                if "max_tokens" in body and refused_fields(response.status_code, said, {"max_completion_tokens"}):
                    body = {**body, "max_completion_tokens": body["max_tokens"]}
                    del body["max_tokens"]
                    continue
                refusal = as_error(response.status_code, said, self._context_length)
                fits = isinstance(refusal, ContextLengthError) and refusal.prompt_tokens < refusal.context_length
                if fits and "max_tokens" in body:  # the answer's limit alone is too long: then the context is the limit
                    body = {name: value for name, value in body.items() if name != "max_tokens"}
                    continue
                passing = response.status_code in _PASSING and isinstance(refusal, EngineFailedError)
                if failures == RETRIES or not passing:
                    raise refusal
            await asyncio.sleep(_FIRST_PAUSE_S * 2**failures)
            failures += 1

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A small question, answered by a JSON object; from any thread."""
        try:
            with self._blocking.stream(method, url, json=body) as response:
                content = bytearray()
                for part in response.iter_raw():
                    content += part
                    if len(content) > _MOST_ANSWER_BYTES:
                        raise malformed("it is too long")
        except httpx2.TransportError as error:
            raise _failed(error) from error
        if not response.is_success:
            raise as_error(response.status_code, _parsed(bytes(content[:_MOST_ERROR_BYTES])), self._context_length)
        return parse_json(bytes(content))

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        self._require_tokenizer()
        tokens = self._ask("POST", f"{self._root}/tokenize", body).get("tokens")
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
        try:
            response = await self._http.post(f"{self._root}/detokenize", json=self._one(token))
        except httpx2.TransportError as error:
            raise _failed(error) from error
        if not response.is_success:
            raise as_error(response.status_code, _parsed(response.content[:_MOST_ERROR_BYTES]), self._context_length)
        self._learn({token: _text_of(parse_json(response.content))})

    def _learn(self, known: dict[int, bytes]) -> None:
        if len(self._bytes) > _MOST_KNOWN_TOKENS:
            self._bytes = {}
        self._bytes |= known

    def _refuse_megabytes(self, text: str) -> None:
        least = len(text.encode("utf-8", "replace")) // _LONGEST_TOKEN_BYTES
        if least > self._context_length:
            raise ContextLengthError(least, self._context_length, at_least=True)


def _addresses(url: str) -> tuple[str, str]:
    """Where the API begins, and where what stands beside it does. Raises :class:`GaleError` for what is no URL."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise GaleError(f"The upstream's address cannot be read: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise GaleError("The upstream's address must be like http://127.0.0.1:8001 or https://host/v1.")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise GaleError(
            "The upstream's address must not hold a user, a key or a query.", hint="Use --upstream-key-env for a key."
        )
    base = str(parsed.copy_with(path=parsed.path.rstrip("/") or "/v1", query=None))
    return base, base.removesuffix("/v1")


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


async def _content(response: httpx2.Response, most: int, *, cut: bool = False) -> bytes:
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > most:
            if cut:
                break
            raise malformed("it is too long")
    return bytes(content[:most])


def _parsed(content: bytes) -> Any:
    """The body of a refusal: JSON, or whatever text a proxy puts in its place."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")


def _text_of(answer: dict[str, Any]) -> bytes:
    """The text in an answer of ``/detokenize``: ``prompt`` in vLLM, ``text`` in SGLang, ``content`` in llama.cpp."""
    for name in ("prompt", "text", "content"):
        if isinstance(text := answer.get(name), str):
            return text.encode("utf-8", "replace")
    raise malformed("it holds no text")


def _failed(error: httpx2.TransportError) -> EngineFailedError:
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return EngineFailedError("The upstream cannot be reached.", hint="Is it running, and is its address right?")
    if isinstance(error, httpx2.TimeoutException):
        return EngineFailedError("The upstream has been silent for too long.", hint="See GALE_UPSTREAM_READ_S.")
    if isinstance(error, httpx2.SSEError):
        return malformed(str(error).rstrip("."))
    return EngineFailedError("The upstream broke off.")
