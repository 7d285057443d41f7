"""Gale's own server as the engine behind the same interface, over real sockets and with the tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gale.core.errors import GaleError
from gale.engine import upstream_http
from gale.engine.local import LocalEngine
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    EngineOverloadedError,
    Finished,
    Grammar,
    PromptError,
    PromptScores,
    SamplingParams,
    TextDelta,
    ToolCallDelta,
    Tools,
    Usage,
)
from gale.engine.upstream import UpstreamEngine
from gale.engine.upstream_wire import UpstreamRefusedError
from gale.platform.store import Store
from gale.text.template import Message
from tests.server.live import Live, eventually, start
from tests.server.upstreams import all_of, ask, on, user

TEXT = "The wind 风从山上吹来 🎉"
GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_http, "_FIRST_PAUSE_S", 0.01)


def test_it_answers_as_the_engine_behind_it_does(tiny: Live) -> None:
    local: LocalEngine = tiny.engine

    async def check(engine: UpstreamEngine) -> None:
        for sampling in (GREEDY, SamplingParams(max_tokens=24, temperature=0.9, top_p=0.8, seed=5)):
            prompt = local.encode(TEXT)
            assert await all_of(engine.complete(prompt, sampling)) == await all_of(local.complete(prompt, sampling))
            assert await all_of(engine.chat(user(TEXT), sampling)) == await all_of(local.chat(user(TEXT), sampling))

    on(tiny.url, check)


def test_it_scores_and_counts_as_the_engine_behind_it_does(tiny: Live) -> None:
    local: LocalEngine = tiny.engine
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=3, prompt_logprobs=True)
    prompt = local.encode(TEXT)

    async def check(engine: UpstreamEngine) -> None:
        assert (engine.model_id, engine.context_length) == ("tiny", 700)
        assert await asyncio.to_thread(engine.encode, TEXT) == prompt
        assert await asyncio.to_thread(engine.encode_chat, user(TEXT)) == local.encode_chat(user(TEXT))
        assert await asyncio.to_thread(engine.count_prompt_tokens, user(TEXT)) == local.count_prompt_tokens(user(TEXT))
        there = await all_of(engine.complete(prompt, sampling))
        assert isinstance(there[0], PromptScores)
        assert there == await all_of(local.complete(prompt, sampling))
        # What scores name is known without asking again, since it is asked for in the event loop.
        engine._http.give_up()
        for token in {each.score.token for each in there if isinstance(each, TextDelta) and each.score}:
            whole = local.token_bytes(token, control_tokens=True).decode("utf-8", "replace")
            assert engine.token_bytes(token) == whole.encode()
        assert await all_of(engine.complete(prompt, SamplingParams(max_tokens=0))) == [
            Finished("length", Usage(len(prompt), 0))
        ]

    on(tiny.url, check)


SAMPLED: list[dict[str, Any]] = [
    {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": ((20, 3.0), (21, -100.0)), "seed": 4},
    {"stop_token_ids": tuple(range(30, 150)), "seed": 5},
    {"logprobs": 2, "seed": 6},
    {"grammar": Grammar("choice", ("yes", "no", "可能")), "seed": 7},
    {"grammar": Grammar("regex", "[a-c]{3} 风+"), "seed": 8},
    {"grammar": Grammar("lark", 'start: "a" "b"+'), "seed": 9},
    {"grammar": Grammar("json_schema", '{"type": "object", "properties": {"n": {"enum": [1, 2]}}}'), "seed": 10},
]


@pytest.mark.parametrize("options", SAMPLED, ids=lambda options: next(iter(options)))
def test_whatever_a_caller_asks_for_reaches_the_engine_behind_it(tiny: Live, options: dict[str, Any]) -> None:
    sampling = SamplingParams(max_tokens=16, temperature=0.9, **options)

    async def check(engine: UpstreamEngine) -> None:
        there = await all_of(engine.chat(user(TEXT), sampling))
        assert there == await all_of(tiny.engine.chat(user(TEXT), sampling))

    on(tiny.url, check)


def test_what_a_server_cannot_be_told_is_refused_and_not_left_out(tiny: Live) -> None:
    for options in ({"priority": 1}, {"grammar": Grammar("spans", ("a b",))}):
        with pytest.raises(UpstreamRefusedError, match="cannot be passed on"):
            ask(tiny.url, SamplingParams(**options))  # type: ignore[arg-type]
    with pytest.raises(GaleError, match="choice"):
        ask(tiny.url, SamplingParams(grammar=Grammar("choice", ())))


def test_tools_are_called_as_by_the_engine_behind_it(tiny: Live) -> None:
    word = {"type": "string", "enum": ["river", "风"]}
    schema = {"type": "object", "properties": {"word": word}, "required": ["word"], "additionalProperties": False}
    functions = tuple({"name": name, "description": "Looks up.", "parameters": schema} for name in ("look", "find"))

    async def calls(engine: UpstreamEngine | LocalEngine, tools: Tools) -> list[Any]:
        events = await all_of(engine.chat(user(TEXT), SamplingParams(temperature=0, max_tokens=60), tools))
        # Ids are drawn anew by whoever answers.
        return [replace(each, id=each.id and "id") if isinstance(each, ToolCallDelta) else each for each in events]

    async def check(engine: UpstreamEngine) -> None:
        for tools in (
            Tools(functions, required=True, parallel=False),
            Tools(functions[:1], required=True, parallel=False),
            Tools(functions),
        ):
            there = await calls(engine, tools)
            assert there == await calls(tiny.engine, tools)
            assert any(isinstance(each, ToolCallDelta) for each in there) == tools.required

    on(tiny.url, check)


def test_gale_behind_gale_behind_gale_says_the_same(tiny: Live, store: Store) -> None:
    engine = UpstreamEngine.connect(tiny.url)
    middle = start(store, engine=engine)
    try:
        body = {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
        direct, through = (server.http.post("/v1/completions", json=body).json() for server in (tiny, middle))
        assert through["usage"] == direct["usage"]
        assert through["choices"][0]["text"] == direct["choices"][0]["text"]
        scores = [each["choices"][0]["logprobs"]["token_logprobs"] for each in (direct, through)]
        assert scores[0] == scores[1]
        chat = {"model": "tiny", "messages": user(TEXT), "max_tokens": 8, "temperature": 0}
        direct, through = (server.http.post("/v1/chat/completions", json=chat).json() for server in (tiny, middle))
        assert (through["choices"], through["usage"]) == (direct["choices"], direct["usage"])
        turn = middle.http.post("/api/conversations", json={}).json()["id"]
        events = middle.http.post(f"/api/conversations/{turn}/turns", json={"content": TEXT, "parent_id": None}).text
        assert "event: done" in events
    finally:
        middle.stop()


def test_prompts_that_are_too_long_are_refused_alike(tiny: Live) -> None:
    async def check(engine: UpstreamEngine) -> None:
        with pytest.raises(ContextLengthError) as caught:
            await all_of(engine.chat(user("风 " * 800), GREEDY))
        assert (caught.value.context_length, caught.value.prompt_tokens > 700) == (700, True)
        with pytest.raises(ContextLengthError):
            await all_of(engine.complete([5] * 700, GREEDY))
        with pytest.raises(ContextLengthError):
            await asyncio.to_thread(engine.count_prompt_tokens, user("x" * 1_000_000))
        with pytest.raises(PromptError):
            engine.complete([], GREEDY)
        with pytest.raises(PromptError):
            engine.complete([-1], GREEDY)
        with pytest.raises(UpstreamRefusedError, match="numbered from 0"):
            await all_of(engine.complete([10**6], GREEDY))
        limit = SamplingParams(max_tokens=10**9, temperature=0)
        assert (await all_of(engine.complete([5] * 690, limit)))[-1].usage.completion_tokens <= 10

    on(tiny.url, check)


def test_closing_an_answer_stops_the_engine_behind_it(live: Live) -> None:
    async def check(engine: UpstreamEngine) -> None:
        events = engine.chat(user("endless"), SamplingParams())
        assert await anext(events) == TextDelta("tick ")
        assert live.engine.active == 1
        await events.aclose()
        task = asyncio.create_task(all_of(engine.chat(user("silent"), SamplingParams())))
        await asyncio.to_thread(eventually, lambda: live.engine.active == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(eventually, lambda: live.engine.active == 0)

    on(live.url, check)


@pytest.mark.parametrize("script", ["breaks", "unfinished", "cancelled", "bug"])
def test_failures_behind_it_are_failures_here(live: Live, script: str) -> None:
    with pytest.raises(EngineFailedError):
        ask(live.url, text=script)


def test_an_overloaded_upstream_is_told_apart_from_a_broken_one(live: Live) -> None:
    with pytest.raises(EngineOverloadedError):
        ask(live.url, text="overloaded")


def test_tools_that_were_called_and_answered_are_passed_on(live: Live) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *user("one"),
        Message(role="assistant", content="", tool_calls=[call]),
        Message(role="tool", content="42", tool_call_id="c1", name="f"),
    ]
    nameless = [*messages[:2], Message(role="tool", content="42")]
    for sent in (messages, nameless):
        on(live.url, lambda engine, sent=sent: all_of(engine.chat(sent, SamplingParams())))
        assert live.engine.prompts[-1] == messages


def test_an_upstream_without_a_tokenizer_gets_conversations_only(live: Live) -> None:
    # The scripted engine cannot encode, so its server fails to tokenise.
    async def check(engine: UpstreamEngine) -> None:
        assert 5 <= await asyncio.to_thread(engine.count_prompt_tokens, user("one two three four")) <= 30
        calls = (lambda: engine.encode("a"), lambda: engine.encode_chat(user("a")), lambda: engine.token_bytes(1))
        for refused in calls:
            with pytest.raises(UpstreamRefusedError, match="does not tokenise"):
                await asyncio.to_thread(refused)

    on(live.url, check)


def test_a_server_that_is_killed_mid_answer_is_a_clean_failure_and_another_one_is_reached_again(
    store: Store, launch: Callable[..., Live]
) -> None:
    server = launch(store=store)

    async def check(engine: UpstreamEngine) -> None:
        events = engine.chat(user("endless"), SamplingParams())
        await anext(events)
        await asyncio.to_thread(server.stop)
        with pytest.raises(EngineFailedError):
            await all_of(events)
        with pytest.raises(EngineFailedError, match="cannot be reached"):
            await all_of(engine.chat(user("hi"), SamplingParams()))

    on(server.url, check)
