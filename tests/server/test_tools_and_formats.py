"""Tools, structured answers and reasoning over HTTP, with the official client and a real model of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from gale.engine.local import LocalEngine
from gale.model.transformer import Decoder
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, start

HELLO: list[Any] = [{"role": "user", "content": "Weather?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "今天天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "北京"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

FORM: dict[str, Any] = {"type": "json_schema"}


class Verdict(BaseModel):
    """What the client's own parsing helper turns into a strict schema."""

    model_config = ConfigDict(extra="forbid")

    good: bool
    marks: list[int] = Field(max_length=2)


@pytest.fixture(scope="module")
def server(store: Store, tokenizer: Tokenizer, model: Decoder) -> Iterator[Live]:
    end = frozenset(tokenizer.encode("<|end|>", control_tokens=True))
    live = start(store, engine=LocalEngine(model, tokenizer, model_id="tiny", end_tokens=end))
    yield live
    live.stop()


@pytest.fixture
def client(server: Live) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


def test_a_forced_call_comes_whole_and_its_result_goes_back(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=1
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    told = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    again = client.chat.completions.create(model="tiny", messages=told, tools=[WEATHER], seed=1, max_tokens=3)
    assert again.usage and answer.usage and again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_streamed_call_is_put_together_by_the_client(client: OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "seed": 2,
    }
    whole = client.chat.completions.create(**ask).choices[0].message.tool_calls or []
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].type == "function" and deltas[0].function
    assert deltas[0].function.name == "weather"
    assert all(delta.index == 0 and delta.id is None and delta.type is None for delta in deltas[1:])
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert arguments == whole[0].function.arguments  # type: ignore[union-attr]
    with client.chat.completions.stream(**ask) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls and message.tool_calls[0].function.arguments == arguments


def test_tools_that_may_not_be_called_are_not_called(client: OpenAI) -> None:
    for choice in ("none", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}}):
        answer = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[WEATHER],
            tool_choice=choice,
            seed=3,
            max_tokens=8,  # type: ignore[call-overload]
        )
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content


def test_the_clients_own_schema_comes_back_as_its_own_type(client: OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Verdict, seed=seed)
        assert isinstance(answer.choices[0].message.parsed, Verdict)


@pytest.mark.parametrize(
    ("extra", "fits"),
    [
        ({"response_format": {"type": "text"}}, lambda text: True),
        ({"guided_regex": "[ab]{3}"}, lambda text: set(text) <= {"a", "b"} and len(text) == 3),
        ({"guided_choice": ["是", "否"]}, lambda text: text in "是否"),
        ({"guided_json": {"type": "boolean"}}, lambda text: isinstance(json.loads(text), bool)),
        ({"guided_grammar": 'start: "x"'}, lambda text: text == "x"),
        ({"structured_outputs": {"regex": "z{2}"}}, lambda text: text == "zz"),
        ({"structured_outputs": {"json": '{"enum": [7]}'}}, lambda text: text == "7"),
        ({"structured_outputs": {"choice": ["c"]}}, lambda text: text == "c"),
    ],
)
def test_answers_take_the_form_that_is_asked_for(client: OpenAI, extra: dict[str, Any], fits: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra, seed=1, max_tokens=20)
    assert fits(answer.choices[0].message.content)


def test_an_answer_cut_within_its_form_says_so_and_is_left_as_it_is(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "minItems": 90}}}
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": form, "seed": 1, "max_tokens": 9}
    choice = client.chat.completions.create(**ask).choices[0]
    chunks = list(client.chat.completions.create(**ask, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert choice.message.content == streamed
    assert streamed.startswith("[")
    with pytest.raises(json.JSONDecodeError):
        json.loads(streamed)


def test_several_structured_answers_at_once(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, n=4, seed=1, extra_body={"guided_choice": ["left", "right"]}
    )
    assert {choice.message.content for choice in answer.choices} <= {"left", "right"}
    assert len(answer.choices) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}},
            "response_format",
        ),
        ({"guided_regex": "(?<=a)b"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs"),
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wizard"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_a_form_or_a_tool_is_refused_by_name(
    client: OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream, extra_body=fields, max_tokens=5)
    assert caught.value.param == param
    assert caught.value.code in ("invalid_value", "missing_required_parameter")


def test_a_free_answer_beside_structured_ones_is_what_it_is_alone(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    alone = client.chat.completions.create(**ask).choices[0].message.content
    with client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, max_tokens=200, extra_body={"guided_regex": "[a-z]{150,200}"}
    ) as stream:
        next(iter(stream))
        assert client.chat.completions.create(**ask).choices[0].message.content == alone
