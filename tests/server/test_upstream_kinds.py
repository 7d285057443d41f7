"""Servers of other kinds: what they serve, what their refusals mean, and the words that each of them understands.

What vLLM, SGLang and llama.cpp answer here is written after their documentation and sources; what a llama.cpp server
really answered is in test_upstream_llama_cpp.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import structlog

from gale.core.errors import GaleError
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    EngineOverloadedError,
    Finished,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    ToolCallDelta,
    Tools,
    Usage,
)
from gale.engine.upstream import UpstreamEngine
from gale.engine.upstream_wire import UpstreamRefusedError
from tests.server.raw_server import DONE, Exchange, event, raw_server
from tests.server.upstreams import all_of, ask, on, user, whole


def refusal(status: int, body: Any) -> Callable[[Exchange, Any], None]:
    kind = "text/html" if isinstance(body, bytes) else "application/json"
    return lambda exchange, _: exchange.reply(status, body, kind)


VLLM_OLD = "This model's maximum context length is 64 tokens. However, you requested 110 tokens (100 in the messages"
VLLM_NEW = (
    "This model's maximum context length is 64 tokens. However, you requested 0 output tokens and your prompt contains "
    "at least 100 input tokens, for a total of at least 100 tokens."
)
SGLANG = "The input (100 tokens) is longer than the model's context length (64 tokens)."
LLAMA = {
    "code": 400,
    "message": "request (100 tokens) exceeds the available context size (64 tokens), try increasing it",
    "type": "exceed_context_size_error",
    "n_prompt_tokens": 100,
    "n_ctx": 64,
}


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"error": {"message": "Incorrect API key provided: sk-123"}}, EngineFailedError),
        (403, b"<html>sk-123</html>", EngineFailedError),
        (404, {"error": {"message": "The model `m` does not exist", "code": "model_not_found"}}, EngineFailedError),
        (429, {"error": {"message": "Rate limit reached"}}, EngineOverloadedError),
        (500, b"", EngineFailedError),
        (400, {"error": {"message": "no", "param": "messages"}}, UpstreamRefusedError),
        (400, {"detail": [{"loc": ["body"], "msg": "no"}]}, UpstreamRefusedError),
        (422, {"detail": "no"}, UpstreamRefusedError),
        (400, [1, 2], UpstreamRefusedError),
        (400, {"error": {"message": VLLM_OLD, "type": "BadRequestError", "code": 400}}, ContextLengthError),
        (400, {"object": "error", "message": VLLM_NEW, "type": "BadRequestError", "code": 400}, ContextLengthError),
        (400, {"object": "error", "message": SGLANG, "type": "BadRequestError", "code": 400}, ContextLengthError),
        (400, {"error": LLAMA}, ContextLengthError),
        (400, {"error": {"message": "Too long.", "code": "context_length_exceeded"}}, ContextLengthError),
    ],
)
def test_refusals_are_told_apart(status: int, body: Any, kind: type[GaleError]) -> None:
    with raw_server(v1__chat__completions=refusal(status, body)) as server, pytest.raises(GaleError) as caught:
        ask(server.url, key="sk-123")
    assert type(caught.value) is kind
    assert "sk-123" not in caught.value.message
    if isinstance(caught.value, ContextLengthError) and "Too long" not in str(body):
        assert (caught.value.prompt_tokens, caught.value.context_length) == (100, 64)


def test_a_field_that_nobody_asked_for_is_left_out_where_it_is_refused_and_stays_out() -> None:
    def strict(exchange: Exchange, body: Any) -> None:
        for name in ("stream_options", "temperature", "top_p"):
            if name in body:
                exchange.reply(400, {"error": {"message": f"Unsupported parameter: '{name}'.", "param": name}})
                return
        exchange.stream(event("here", "stop"), DONE)

    with raw_server(v1__chat__completions=strict) as server:

        async def check(engine: UpstreamEngine) -> None:
            for _ in range(2):
                assert (await all_of(engine.chat(user("hi"), SamplingParams())))[0] == TextDelta("here")
            assert len(server.bodies("/v1/chat/completions")) == 3 + 1 + 1
            with pytest.raises(UpstreamRefusedError, match="temperature"):
                await all_of(engine.chat(user("hi"), SamplingParams(temperature=0.3)))

        on(server.url, check)


def test_a_limit_under_its_newer_name_and_a_limit_beyond_the_context() -> None:
    def newer(exchange: Exchange, body: Any) -> None:
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            exchange.reply(400, {"error": {"message": message, "param": "max_tokens"}})
        else:
            exchange.stream(event(str(body["max_completion_tokens"]), "stop"), DONE)

    def vllm(exchange: Exchange, body: Any) -> None:
        if body.get("max_tokens", 0) > 44:
            message = "'max_tokens' is too large: 50. This model's maximum context length is 64 tokens and your "
            message += "request has 20 input tokens (50 > 64 - 20)."
            exchange.reply(400, {"error": {"message": message, "code": 400}})
        else:
            exchange.stream(event("here", "length"), DONE)

    with raw_server(v1__chat__completions=newer) as server:
        assert ask(server.url, SamplingParams(max_tokens=7))[0] == "7"
    with raw_server(v1__chat__completions=vllm) as server:
        assert ask(server.url, SamplingParams(max_tokens=50))[0] == "here"
        assert "max_tokens" not in server.bodies("/v1/chat/completions")[-1]
        assert ask(server.url, SamplingParams(max_tokens=30))[0] == "here"
        assert server.bodies("/v1/chat/completions")[-1]["max_tokens"] == 30


def models(*cards: dict[str, Any]) -> Callable[[Exchange, Any], None]:
    return lambda exchange, _: exchange.reply(200, {"object": "list", "data": list(cards)})


@pytest.mark.parametrize(
    ("card", "length"),
    [
        ({"max_model_len": 4096}, 4096),
        ({"meta": {"n_ctx": 2048, "n_ctx_train": 131072}}, 2048),
        ({"context_length": 8192}, 8192),
        ({"context_window": 1024}, 1024),
    ],
)
def test_the_context_is_what_the_model_list_says(card: dict[str, Any], length: int) -> None:
    with raw_server(v1__models=models({"id": "m", **card})) as server:

        async def check(engine: UpstreamEngine) -> int:
            return engine.context_length

        assert on(server.url, check) == length
        assert on(f"{server.url}/v1/", check, context_length=77) == 77


def test_what_cannot_be_known_has_to_be_said() -> None:
    with raw_server(v1__models=models({"id": "a", "meta": {"n_ctx_train": 9}}, {"id": "b"})) as server:
        with pytest.raises(GaleError, match="serves 2 models: a, b") as several:
            UpstreamEngine.connect(server.url)
        assert "--upstream-model" in str(several.value.hint)
        with pytest.raises(GaleError, match="how long the context of a is") as silent:
            UpstreamEngine.connect(server.url, model="a")
        assert "--upstream-context" in str(silent.value.hint)
    with pytest.raises(EngineFailedError, match="cannot be reached"):
        UpstreamEngine.connect(server.url)
    for url in ("ftp://x", "127.0.0.1:80", "http://", "http://user:key@host/v1", "http://host/v1?key=k"):
        with pytest.raises(GaleError, match="address"):
            UpstreamEngine.connect(url)


def test_the_key_travels_in_the_header_and_nowhere_else() -> None:
    one = whole(event("a", "stop"), DONE)
    with raw_server(v1__chat__completions=one) as server, structlog.testing.capture_logs() as logs:
        ask(server.url, key="sk-secret")
        assert {headers["authorization"] for _, _, headers in server.seen} == {"Bearer sk-secret"}
        assert "sk-secret" not in json.dumps([(path, body) for path, body, _ in server.seen]) + str(logs)


# llama.cpp's server, after tools/server/README.md


def llama_cpp_server() -> dict[str, Callable[[Exchange, Any], None]]:
    tokens = {"Hello": 9906, " world": 1917, "<|user|>Hello world": 7}

    def tokenize(exchange: Exchange, body: Any) -> None:
        assert set(body) == {"content", "add_special"}
        found = [tokens[text] for text in ([body["content"]] if body["content"] in tokens else ["Hello", " world"])]
        exchange.reply(200, {"tokens": found})

    def complete(exchange: Exchange, body: Any) -> None:
        entry = {"id": 1917, "token": " world", "bytes": list(b" world"), "logprob": -0.5}
        shown = {"content": [{**entry, "top_logprobs": [entry, {**entry, "id": 9906, "logprob": -1.5}]}]}
        choice = {"text": " world", "index": 0, "logprobs": shown, "finish_reason": None}
        usage = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
        if not body.get("stream"):
            exchange.reply(200, {"choices": [choice]})
            return
        last = {"text": "", "index": 0, "finish_reason": "length"}
        chunks = [{"choices": [choice]}, {"choices": [last], "usage": usage}]
        exchange.stream(*[b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks], DONE)

    return {
        "v1__models": models({"id": "../models/m.gguf", "owned_by": "llamacpp", "meta": {"n_ctx_train": 131072}}),
        "props": lambda exchange, _: exchange.reply(200, {"default_generation_settings": {"n_ctx": 1024}}),
        "apply-template": lambda exchange, _: exchange.reply(200, {"prompt": "<|user|>Hello world"}),
        "tokenize": tokenize,
        "detokenize": lambda exchange, _: exchange.reply(200, {"content": "Hello"}),
        "v1__completions": complete,
        "v1__chat__completions": whole(
            event("Hi", timings={"prompt_n": 1}),
            event(None, "stop", usage={"prompt_tokens": 7, "completion_tokens": 1}),
            DONE,
        ),
    }


def test_llama_cpp_s_server_is_spoken_to_in_its_own_words() -> None:
    with raw_server(**llama_cpp_server()) as server:

        async def check(engine: UpstreamEngine) -> None:
            assert (engine.model_id, engine.context_length) == ("../models/m.gguf", 1024)
            assert await asyncio.to_thread(engine.encode, "Hello") == [9906]
            assert await asyncio.to_thread(engine.count_prompt_tokens, user("Hello world")) == 1
            assert await all_of(engine.chat(user("Hello world"), SamplingParams())) == [
                TextDelta("Hi"),
                Finished("stop", Usage(7, 1)),
            ]
            events = await all_of(engine.complete([9906], SamplingParams(max_tokens=1, logprobs=2)))
            assert events[0].text == " world"
            assert events[0].score.top == ((1917, -0.5), (9906, -1.5))
            assert engine.token_bytes(1917) == b" world"
            with pytest.raises(UpstreamRefusedError, match="no log-probabilities of prompts"):
                scores = SamplingParams(max_tokens=0, logprobs=2, prompt_logprobs=True)
                await all_of(engine.complete([9906, 1917, 5], scores))

        on(server.url, check)
        sent = server.bodies("/v1/chat/completions")[0]
        # Its own defaults would be top-k 40 and min-p 0.05.
        assert (sent["top_k"], sent["min_p"], sent["repeat_penalty"], sent["temperature"]) == (-1, 0.0, 1.0, 1.0)


def test_a_server_of_another_kind_gets_openai_s_fields_only() -> None:
    with raw_server(v1__chat__completions=whole(event("a", "stop"), DONE)) as server:
        ask(server.url, SamplingParams(max_tokens=5, temperature=0.5, top_p=0.5, seed=3, stop=("x",)))
        assert server.bodies("/v1/chat/completions") == [
            {
                "model": "m",
                "messages": user("hi"),
                "max_tokens": 5,
                "temperature": 0.5,
                "top_p": 0.5,
                "seed": 3,
                "stop": ["x"],
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ]


def test_scores_without_ids_are_refused_and_not_made_up() -> None:
    entry = {"token": "a", "bytes": [97], "logprob": -1, "top_logprobs": []}
    chunk = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [entry]}}]}
    named = whole(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    with raw_server(v1__chat__completions=named) as server, pytest.raises(UpstreamRefusedError, match="no ids"):
        ask(server.url, SamplingParams(logprobs=0))


def test_reasoning_and_tool_calls_come_in_whatever_way_a_server_writes_them() -> None:
    def delta(**fields: Any) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": fields}]}).encode() + b"\n\n"

    def call(index: int, **fields: Any) -> dict[str, Any]:
        return {"index": index, **fields}

    stream = whole(
        delta(reasoning_content="so ", content=None),
        delta(reasoning="then", tool_calls=None),
        delta(content="now "),
        delta(tool_calls=[call(1, id="a", type="function", function={"name": "f", "arguments": ""})]),
        delta(tool_calls=[call(1, function={"arguments": '{"x": '})]),
        delta(tool_calls=[call(1, id="a", function={"name": "f", "arguments": "1}"})]),
        delta(tool_calls=[call(4, id=None, function={"name": "g", "arguments": "{}"})]),
        event(None, "tool_calls", usage={"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": None}),
        DONE,
    )
    function = {"name": "f", "parameters": {"type": "object"}}
    with raw_server(v1__chat__completions=stream) as server:
        tools = Tools((function, {"name": "g"}, {"name": "h"}), only=frozenset("fg"))
        events = on(server.url, lambda engine: all_of(engine.chat(user("hi"), SamplingParams(), tools)))
        *others, second, end = events
        assert others == [
            ReasoningDelta("so "),
            ReasoningDelta("then"),
            TextDelta("now "),
            ToolCallDelta(0, "a", "f", ""),
            ToolCallDelta(0, None, None, '{"x": '),
            ToolCallDelta(0, None, None, "1}"),
        ]
        assert (second.index, second.name, second.arguments, bool(second.id)) == (1, "g", "{}", True)
        assert end == Finished("stop", Usage(9, 8))
        sent = server.bodies("/v1/chat/completions")[0]
        assert sent["tools"] == [{"type": "function", "function": each} for each in (function, {"name": "g"})]
        assert (sent["tool_choice"], "parallel_tool_calls" in sent) == ("auto", False)
        single = replace(tools, parallel=False)
        events = on(server.url, lambda engine: all_of(engine.chat(user("hi"), SamplingParams(), single)))
        assert (events[:-1], events[-1].reason) == (others, "stop")
        assert server.bodies("/v1/chat/completions")[1]["parallel_tool_calls"] is False
    nameless = whole(delta(tool_calls=[call(0, id="a", function={"arguments": "{}"})]))
    with raw_server(v1__chat__completions=nameless) as server, pytest.raises(EngineFailedError, match="no name"):
        ask(server.url)


def test_adapters_over_a_model_are_names_of_their_own() -> None:
    cards = [{"id": "m", "max_model_len": 64}, {"id": "lora", "parent": "m"}, {"id": "other", "parent": "x"}]
    cards.append({"id": "gale-moderation", "task": "moderation"})  # which answers nobody
    answer = whole(event("a", "stop"), DONE)
    with raw_server(v1__models=models(*cards), v1__chat__completions=answer) as server:

        async def check(engine: UpstreamEngine) -> None:
            assert (engine.model_id, engine.adapters) == ("m", ("lora",))
            await all_of(engine.chat(user("hi"), SamplingParams(adapter="lora")))

        on(server.url, check)
        assert server.bodies("/v1/chat/completions")[0]["model"] == "lora"
