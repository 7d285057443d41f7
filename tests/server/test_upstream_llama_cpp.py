"""llama.cpp's own server as the engine, by what it answered when it was recorded (see record_llama_cpp.py).

The tests fail where Gale asks anything else than what was recorded, and compare the answers with those of Gale's own
engine, which has the same model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gale.engine import upstream_http
from gale.engine.local import LocalEngine
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    Finished,
    SamplingParams,
    TextDelta,
    ToolCallDelta,
    Tools,
    Usage,
)
from gale.engine.upstream_wire import UpstreamRefusedError
from gale.registry.models import resolve_model
from tests.server.llama_cpp_cases import (
    ENGINE,
    FUNCTIONS,
    GALE_SERVE,
    GREEDY,
    PROMPT,
    QUESTION,
    RESTARTED,
    TEXT,
    WRONG_KEY,
    ask_all,
    chat,
)
from tests.server.record_llama_cpp import gale_serve
from tests.server.recorded import load, replayed
from tests.server.upstreams import all_of, on, user

KNOWN = "I don't know. If you give me a text that"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_http, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalEngine]:
    engine = LocalEngine.load(resolve_model("gale-0"))
    yield engine
    asyncio.run(engine.close())


def recorded(case: str) -> Any:
    """What the engine answers, with the recording in the server's place."""
    with replayed("llama_cpp", case) as url:
        return on(url, ENGINE[case])


def text_of(events: list[Any]) -> str:
    return "".join(each.text for each in events if isinstance(each, TextDelta))


def calls_of(events: list[Any]) -> list[tuple[str, Any]]:
    calls: dict[int, list[str]] = {}
    for each in events:
        if isinstance(each, ToolCallDelta):
            assert bool(each.id) == bool(each.name)
            calls.setdefault(each.index, []).extend([each.name or "", each.arguments])
    return [(parts[0], json.loads("".join(parts[1:]))) for parts in calls.values()]


def test_the_recording_says_what_was_recorded() -> None:
    content = load("llama_cpp")
    assert content["about"]["software"] == "llama.cpp llama-server"
    assert "commit" in content["about"]["version"]
    assert content["cases"].keys() == {*ENGINE, WRONG_KEY, RESTARTED, GALE_SERVE}


def test_it_tells_its_model_and_its_context() -> None:
    assert recorded("connect") == ("gale-0", 512, ())


def test_it_tokenises_and_counts_tools_too(local: LocalEngine) -> None:
    tokens, prompt, counted, texts = recorded("tokens")
    assert tokens == local.encode(TEXT)
    assert prompt == local.encode_chat(user("The wind 🎉"))
    # Both templates show the tools; the space after a colon is all that may differ.
    assert counted == pytest.approx(local.count_prompt_tokens(user("The wind"), Tools(FUNCTIONS)), rel=0.05)
    assert texts == [b" =", b"\xef\xbf\xbd", b"<|tool|>"]


def test_greedy_answers_are_those_of_gale_s_engine(local: LocalEngine) -> None:
    events = recorded("chat")
    assert text_of(events) == KNOWN
    assert events[-1] == Finished("length", Usage(9, 12))

    async def own(sampling: SamplingParams, prompt: list[int] | None = None) -> list[Any]:
        return await all_of(local.complete(prompt, sampling) if prompt else local.chat(user(QUESTION), sampling))

    assert text_of(asyncio.run(own(GREEDY))) == KNOWN
    greedy = asyncio.run(own(SamplingParams(max_tokens=4, temperature=0, logprobs=2), PROMPT))
    assert text_of(recorded("completion")) == text_of(greedy)
    for there, here in zip(recorded("scores"), greedy, strict=True):
        if isinstance(there, TextDelta):
            assert (there.text, there.score.token) == (here.text, here.score.token)
            assert there.score.logprob == pytest.approx(here.score.logprob, abs=0.1)
            assert len(there.score.top) == 2


def test_scores_come_without_others_beside_them_and_in_conversations_too() -> None:
    alone = [each.score for each in recorded("scores without others")[:-1]]
    assert [score.top for score in alone] == [()] * len(alone)
    assert [score.logprob for score in alone] == [each.score.logprob for each in recorded("scores")[:-1]]
    assert [len(each.score.top) for each in recorded("chat scores")[:-1]] == [2, 2, 2]
    with pytest.raises(UpstreamRefusedError, match="no log-probabilities of prompts"):
        recorded("prompt scores")


def test_all_that_is_asked_of_sampling_is_taken_and_limits_hold() -> None:
    assert recorded("sampled")[-1].usage == Usage(9, 4)
    assert recorded("no limit")[-1].reason == "stop"
    events = recorded("stop")
    assert (text_of(events), events[-1].reason) == ("I don't know. If", "stop")


def test_answers_are_held_to_grammars_in_conversations_and_completions() -> None:
    events = recorded("object")
    assert json.loads(text_of(events))["n"] in (1, 2)
    assert events[-1].reason == "stop"
    assert json.loads(text_of(recorded("completed word"))) in ("rain", "snow")
    assert text_of(recorded("choice")) in ("yes", 'no "风"')


def test_tools_are_called_where_they_must_be_and_their_answers_are_taken() -> None:
    assert calls_of(recorded("tools")) == []
    for case in ("one tool, required", "tools, required"):
        events = recorded(case)
        ((name, arguments),) = calls_of(events)
        assert name in {function["name"] for function in FUNCTIONS}
        assert arguments["word"] in ("river", "风")
        assert (text_of(events), events[-1].reason) == ("", "stop")
    events = recorded("second call")
    assert len(calls_of(events)) == 1
    assert events[-1].reason == "stop"
    assert text_of(recorded("answered call"))


def test_its_refusals_are_told_apart() -> None:
    with pytest.raises(ContextLengthError) as caught:
        recorded("too long")
    assert (caught.value.prompt_tokens, caught.value.context_length) == (605, 512)
    with pytest.raises(UpstreamRefusedError, match="invalid tokens"):
        recorded("no such token")
    with pytest.raises(UpstreamRefusedError, match="unrecognized type nonsense"):
        recorded("no schema")
    with (
        pytest.raises(EngineFailedError, match="does not accept Gale's key"),
        replayed("llama_cpp", WRONG_KEY) as url,
    ):
        on(url, chat(), key="wrong")


def test_a_server_that_is_still_loading_its_model_is_asked_again() -> None:
    assert [each["status"] for each in load("llama_cpp")["cases"][RESTARTED]] == [200, 200, 503, 200]
    with replayed("llama_cpp", RESTARTED) as url:
        assert text_of(on(url, chat())) == KNOWN


def test_openai_s_client_reaches_it_through_gale_serve(tmp_path_factory: pytest.TempPathFactory) -> None:
    with (
        replayed("llama_cpp", GALE_SERVE) as url,
        gale_serve(url, tmp_path_factory.mktemp("home")) as client,
    ):
        answers = ask_all(client)
    assert [model.id for model in answers["models"].data] == ["gale-0", "gale-moderation"]
    (choice,) = answers["chat"].choices
    assert (choice.message.content, choice.finish_reason) == ("I don't", "stop")
    assert [each.token for each in choice.logprobs.content] == ["I", " don", "'t"]
    assert answers["chat"].usage.prompt_tokens == 9
    *chunks, last = answers["stream"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I don't know. If"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 6)
    assert chunks[-1].choices[0].finish_reason == "length"
    (completed,) = answers["completion"].choices
    assert len(completed.logprobs.token_logprobs) == 3
    assert completed.text == "".join(completed.logprobs.tokens)
    (choice,) = answers["call"].choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("find", "tool_calls")
    assert json.loads(call.function.arguments)["word"] in ("river", "风")
    assert isinstance(answers["too long"], openai.BadRequestError)
    assert answers["too long"].code == "context_length_exceeded"
    for name in ("unknown model", "embeddings"):
        assert isinstance(answers[name], openai.NotFoundError), answers[name]
