"""The Responses API and its conversations through the official client, over the tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.live import Live

pytestmark = pytest.mark.both_databases

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Lima"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(tiny: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: openai.OpenAI, **arguments: Any) -> Any:
    return client.responses.create(**{"model": "tiny", "input": "Hello", "max_output_tokens": 16, **arguments})


def test_an_answer_is_kept_and_can_be_deleted(client: openai.OpenAI) -> None:
    made = ask(client, metadata={"a": "b"})
    assert made.status in ("completed", "incomplete")
    assert made.usage.input_tokens > 0
    kept = client.responses.retrieve(made.id)
    assert kept == made
    items = client.responses.input_items.list(made.id).data
    assert [(item.role, item.content[0].text) for item in items] == [("user", "Hello")]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    unkept = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_stream_ends_as_the_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=0)
    events = list(ask(client, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    # The client's own reader takes only answers that end by themselves, as one with a grammar does.
    form: Any = {"format": {"type": "json_schema", "name": "yes", "schema": {"enum": ["yes"]}}}
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=16, text=form) as stream:
        assert stream.get_final_response().output_text == '"yes"'


def test_what_came_before_is_read(client: openai.OpenAI) -> None:
    first = ask(client, instructions="Be brief.")
    alone = ask(client)
    second = ask(client, previous_response_id=first.id)
    third = ask(client, previous_response_id=second.id)
    assert alone.usage.input_tokens < second.usage.input_tokens < third.usage.input_tokens
    by_hand = ask(
        client,
        input=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": [{"type": "output_text", "text": first.output_text}]},
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        ],
    )
    assert by_hand.usage.input_tokens == second.usage.input_tokens  # instructions are not carried over
    counted = client.responses.input_tokens.count(model="tiny", input="Hello", previous_response_id=first.id)
    assert counted.input_tokens == second.usage.input_tokens


def test_functions(client: openai.OpenAI) -> None:
    made = ask(client, tools=[TOOL], tool_choice="required", max_output_tokens=100)
    call = next(item for item in made.output if item.type == "function_call")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Lima")
    events = list(ask(client, tools=[TOOL], tool_choice={"type": "function", "name": "weather"}, stream=True,
                      max_output_tokens=100))  # fmt: skip
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.name == "weather"
    answered = ask(
        client,
        previous_response_id=made.id,
        tools=[TOOL],
        tool_choice="none",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}],
    )
    assert answered.output[0].type == "message"


def test_structured_answers_and_scores(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "answer", "schema": {"enum": ["yes"]}, "strict": True}
    made = ask(client, text={"format": form}, include=["message.output_text.logprobs"], top_logprobs=2)
    part = made.output[0].content[0]
    assert part.text == '"yes"'
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


def test_a_conversation_grows(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(metadata={"a": "b"}, items=[{"role": "user", "content": "One"}])
    first = ask(client, conversation=conversation.id)
    items = client.conversations.items.list(conversation.id, order="asc").data
    texts = [part.text for item in items for part in item.content]
    assert texts == ["One", "Hello", first.output_text]
    assert first.conversation.id == conversation.id
    second = ask(client, conversation={"id": conversation.id})
    assert second.usage.input_tokens > first.usage.input_tokens
    client.conversations.items.delete(items[0].id, conversation_id=conversation.id)
    assert client.conversations.update(conversation.id, metadata={"c": "d"}).metadata == {"c": "d"}
    page = client.conversations.items.list(conversation.id, limit=2, order="asc")
    assert page.has_more
    assert len(list(page)) == 4
    client.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        ask(client, conversation=conversation.id)


def test_in_the_background(client: openai.OpenAI) -> None:
    made = ask(client, background=True)
    assert made.status == "queued"
    deadline = time.monotonic() + 30
    while (kept := client.responses.retrieve(made.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert kept.output_text
    long = ask(client, background=True, max_output_tokens=600, temperature=0, text={"format": {"type": "json_object"}})
    assert client.responses.cancel(long.id).status in ("cancelled", "completed", "incomplete")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(ask(client).id)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].tool_call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": 3}, "max_output_tokens"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}}, "text.format"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_x", "conversation": "conv_x"}, "conversation"),
    ],
)
def test_bad_requests_name_the_parameter(client: openai.OpenAI, arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **arguments)
    assert caught.value.param == param


def test_unknown_ids(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, previous_response_id="resp_nothing")
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_nothing")
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.list("conv_nothing")
