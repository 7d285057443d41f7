"""The official client, synchronous and asynchronous, against a real server."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.live import Live, eventually

USER = "Grüße an alle: 你好 🎉 data: x"


@pytest.fixture
def client(live: Live) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key="anything at all", max_retries=0)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_whole_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted/one", messages=ask(USER))
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == USER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (8, 7, 15)
    assert answer._request_id


def test_stream_says_the_same_in_the_promised_order(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="scripted/one", messages=ask(USER), stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].finish_reason is None for chunk in middle)
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == USER
    assert last.choices[0].delta.model_dump(exclude_none=True) == {}
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.total_tokens == 15
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_without_usage_ends_with_the_reason_and_done(live: Live) -> None:
    body = {"model": "scripted/one", "messages": ask("a b"), "stream": True}
    response = live.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in chunks)


def test_the_client_s_own_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="scripted/one", messages=ask("one two three")) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "one two three"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_ends_with_length(client: OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model="scripted/one", messages=ask("a b c d"), **{name: 2})
    assert answer.choices[0].message.content == "a b"
    assert answer.choices[0].finish_reason == "length"


def test_sampling_parameters_reach_the_engine(live: Live, client: OpenAI) -> None:
    client.chat.completions.create(
        model="scripted/one",
        messages=ask("hi"),
        temperature=0,
        top_p=0.5,
        seed=-(2**63),
        stop=["a", "b"],
        max_tokens=7,
        max_completion_tokens=7,
        user="me",
        metadata={"a": "b"},
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"7": -100, "9": 3},
        response_format={"type": "text"},
        logprobs=True,
        top_logprobs=4,
        extra_body={"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [3, 5]},
    )
    sampling = live.engine.sampling[-1]
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0, 0.5, -(2**63))
    assert (sampling.stop, sampling.max_tokens) == (("a", "b"), 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1)
    assert sampling.logit_bias == ((7, -100), (9, 3))
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (20, 0.1, 1.2)
    assert (sampling.stop_token_ids, sampling.logprobs) == ((3, 5), 4)


def test_several_choices_come_whole_and_streamed(live: Live, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted/one", messages=ask(USER), n=3, seed=5)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, USER), (1, USER), (2, USER)]
    assert [sampling.seed for sampling in live.engine.sampling[-3:]] == [5, 6, 7]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 3 * 7)
    with client.chat.completions.stream(
        model="scripted/one", messages=ask(USER), n=3, stream_options={"include_usage": True}
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        final = stream.get_final_completion()
    assert [chunk.choices[0].index for chunk in chunks if chunk.choices and chunk.choices[0].delta.role] == [0, 1, 2]
    assert [choice.message.content for choice in final.choices] == [USER] * 3
    assert chunks[-1].usage == answer.usage


def test_one_failed_choice_fails_the_answer_and_ends_the_others(live: Live, client: OpenAI) -> None:
    for script, kind in (("overloaded", openai.InternalServerError), ("breaks", openai.APIError)):
        for stream in (False, True):
            with pytest.raises(kind):
                list(client.chat.completions.create(model="scripted/one", messages=ask(script), n=3, stream=stream))
    eventually(lambda: live.engine.active == 0)


def test_messages_reach_the_engine_as_its_template_takes_them(live: Live, client: OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    client.chat.completions.create(model="scripted/one", messages=messages)  # type: ignore[arg-type]
    assert live.engine.prompts[-1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
    ]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scripted/one", "gale-moderation"]
    assert client.models.retrieve("scripted/one").owned_by == "gale"
    judge = client.models.retrieve("gale-moderation")
    assert (judge.owned_by, judge.model_extra) == ("gale", {"task": "moderation"})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=judge.id, messages=[{"role": "user", "content": "one"}])
    with pytest.raises(openai.BadRequestError, match="not fine-tuned"):
        client.models.delete(judge.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_http_errors_even_for_streams(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=ask("hi"), stream=stream)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="scripted/one", messages=ask("a " * 99), stream=stream)
    assert too_long.value.code == "context_length_exceeded"
    assert "100 tokens" in too_long.value.message
    with pytest.raises(openai.InternalServerError) as overloaded:
        client.chat.completions.create(model="scripted/one", messages=ask("overloaded"), stream=stream)
    assert overloaded.value.status_code == 503
    assert overloaded.value.response.headers["retry-after"] == "2"


def test_context_is_used_to_its_last_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted/one", messages=ask("a " * 98))
    assert answer.usage is not None
    assert answer.usage.total_tokens == 100
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("script", "status"), [("breaks", 503), ("unfinished", 503), ("cancelled", 503), ("bug", 500), ("bug-at-once", 500)]
)
def test_failures_of_whole_answers(client: OpenAI, script: str, status: int) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="scripted/one", messages=ask(script))
    assert caught.value.status_code == status
    assert "secret" not in caught.value.message
    if status == 500:
        assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("script", ["breaks", "unfinished", "cancelled", "bug"])
def test_failures_within_a_stream_are_one_error_event(live: Live, client: OpenAI, script: str) -> None:
    with pytest.raises(openai.APIError) as caught:
        for _ in client.chat.completions.create(model="scripted/one", messages=ask(script), stream=True):
            pass
    assert "secret" not in caught.value.message
    body = {"model": "scripted/one", "messages": ask(script), "stream": True}
    events = live.http.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    assert set(json.loads(events[-1].removeprefix("data: "))["error"]) == {"message", "type", "param", "code"}
    assert not any('"finish_reason":"' in event or "[DONE]" in event for event in events)


def test_many_streams_at_once_do_not_wait_for_each_other(live: Live) -> None:
    async def one(client: AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(model="scripted/one", messages=ask(text), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everything() -> None:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="k", max_retries=0) as client:
            endless = await client.chat.completions.create(model="scripted/one", messages=ask("endless"), stream=True)
            texts = [f"text {index}" for index in range(20)]
            assert await asyncio.gather(*(one(client, text) for text in texts)) == texts
            await endless.close()

    asyncio.run(everything())
    eventually(lambda: live.engine.active == 0)
