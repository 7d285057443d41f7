"""Anthropic's Messages API through its official client, over the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest

from tests.server.live import Live

TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Lima"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(tiny: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=tiny.url, api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: anthropic.Anthropic, **arguments: Any) -> Any:
    question = [{"role": "user", "content": "Hello"}]
    return client.messages.create(**{"model": "tiny", "max_tokens": 8, "messages": question, **arguments})


def test_a_message(client: anthropic.Anthropic) -> None:
    message = ask(client, system="Be brief.", extra_body={"top_k": 5})
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert message.stop_reason in ("max_tokens", "end_turn")
    assert [block.type for block in message.content] == ["text"]
    assert message.usage.input_tokens > 0
    plain = ask(client, messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    counted = client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    assert counted.input_tokens == plain.usage.input_tokens + plain.usage.cache_read_input_tokens


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    greedy: Any = {"extra_body": {"temperature": 0}}
    whole = ask(client, **greedy)
    question: Any = [{"role": "user", "content": "Hello"}]
    with client.messages.stream(model="tiny", max_tokens=8, messages=question, **greedy) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_message()
    assert last.content[0].text == whole.content[0].text
    assert last.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-2:] == ["message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    greedy: Any = {"extra_body": {"temperature": 0}}
    text = ask(client, **greedy).content[0].text
    stop = text[2:4]
    message = ask(client, stop_sequences=["never met", stop], **greedy)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in message.content) == text[: text.index(stop)]


def test_a_tool_is_called_and_its_result_read(client: anthropic.Anthropic) -> None:
    choice = {"type": "tool", "name": "weather"}
    message = ask(client, tools=[TOOL], tool_choice=choice, max_tokens=100)
    call = message.content[-1]
    assert (call.type, call.name, message.stop_reason) == ("tool_use", "weather", "tool_use")
    assert call.input["city"] in ("Oslo", "Lima")
    question: Any = [{"role": "user", "content": "Hello"}]
    with client.messages.stream(
        model="tiny", max_tokens=100, messages=question, tools=[TOOL], tool_choice=choice
    ) as stream:
        assert stream.get_final_message().content[-1].input["city"] in ("Oslo", "Lima")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain"}]}
    turns = [
        *question,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    assert ask(client, messages=turns, tools=[TOOL], tool_choice={"type": "none"}).content[0].type == "text"


def test_errors_have_anthropic_s_shape(client: anthropic.Anthropic, tiny: Live) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(client, model="other")
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        ask(client, thinking={"type": "enabled", "budget_tokens": 1024})
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
        ask(client, messages=[{"role": "user", "content": [image]}])
    broken = httpx2.post(f"{tiny.url}/v1/messages", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["type"]) == (400, "error")
    assert broken.json()["error"]["type"] == "invalid_request_error"
