"""What is not a proper request is refused with OpenAI's error body, names its field, and never breaks the server."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.live import Live

URL = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]


def post(live: Live, body: bytes | str) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else body.encode()
    response = live.http.post(URL, content=content, headers=JSON)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error


def with_fields(**fields: Any) -> str:
    return json.dumps({"model": "scripted/one", "messages": HELLO, **fields})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "line 1"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"null", "object"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "digits"),
        (b'{"model": "a", "model": "b"}', "twice"),
        (b'{"model": "\\ud800", "messages": []}', "surrogate"),
        (b'{"x": [[{"\\udfff": 1}]]}', "surrogate"),
        (b'{"model": "a\\u0000"}', "NUL"),
        (b'{"model": "a\x00"}', "JSON"),
        (with_fields(other=float("nan")).encode(), "NaN"),
    ],
)
def test_bodies_that_are_not_a_request(live: Live, body: bytes, words: str) -> None:
    status, error = post(live, body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -0.0}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1e9}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"max_completion_tokens": 2**70}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.0}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty"),
        ({"logit_bias": {"5": 1e300}}, "logit_bias.5"),
        ({"logit_bias": {"5": True}}, "logit_bias.5"),
        ({"logit_bias": {str(token): 1 for token in range(200_000)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a"] * 10_000}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": "a" * 1_000_000}, "stop[0]"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 10_000}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "{x}"}, {"type": "image_url"}]}]},
            "messages[0].content[1].type",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "messages[0].tool_calls[0].id"),
    ],
)
def test_fields_out_of_range(live: Live, fields: dict[str, Any], param: str) -> None:
    status, error = post(live, with_fields(**fields))
    assert (status, error["param"]) == (400, param)
    assert error["code"] in ("invalid_value", "invalid_type", "missing_required_parameter")


def test_long_lists_of_wrong_items_are_refused_without_looking_into_them(live: Live) -> None:
    wrong = [{}] * 60_000
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": wrong}]
    for fields in ({"messages": messages}, {"metadata": {str(number): 1 for number in range(60_000)}}):
        began = time.process_time()
        status, error = post(live, with_fields(**fields))
        assert status == 400
        assert "at most" in error["message"]
        assert time.process_time() - began < 1  # CPU time; one error for each item took many times that


@pytest.mark.parametrize("key", ["word", "", "-1", "1.5", "05", "٥", "9" * 30])
def test_a_bias_is_for_a_token_s_number(live: Live, key: str) -> None:
    status, error = post(live, with_fields(logit_bias={key: 1}))
    assert (status, error["code"]) == (400, "invalid_value")
    assert error["param"].startswith("logit_bias")


def test_missing_fields(live: Live) -> None:
    assert post(live, "{}")[1]["param"] == "model"
    status, error = post(live, json.dumps({"model": "scripted/one"}))
    assert (status, error["code"], error["param"]) == (400, "missing_required_parameter", "messages")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"a": 1}),
    ],
)
def test_what_gale_lacks_is_refused_by_name(live: Live, name: str, value: Any) -> None:
    status, error = post(live, with_fields(**{name: value}))
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", name)


OPTIONAL = [
    "stream stream_options max_tokens max_completion_tokens temperature top_p seed stop user metadata store",
    "parallel_tool_calls n tools tool_choice response_format logprobs top_logprobs logit_bias presence_penalty",
    "top_k min_p repetition_penalty stop_token_ids",
    "frequency_penalty functions function_call modalities audio service_tier reasoning_effort prediction",
]


def test_null_and_unknown_fields_are_accepted(live: Live) -> None:
    nulls = dict.fromkeys(" ".join(OPTIONAL).split())
    extra = {"stop": [], "my_own": {"deep": [1]}, "service_tier": "auto", "tools": [], "n": 1}
    for fields in (nulls, extra):
        response = live.http.post(URL, content=with_fields(**fields), headers=JSON)
        assert response.status_code == 200, response.text


def test_only_json_is_taken(live: Live) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", ""):
        response = live.http.post(URL, content=with_fields(), headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
    response = live.http.post(URL, content=with_fields(), headers={"content-type": 'Application/JSON; charset="UTF-8"'})
    assert response.status_code == 200


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]) | anything
parts = st.fixed_dictionaries({}, optional={"type": st.just("text") | anything, "text": anything}) | anything
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": roles,
        "content": st.lists(parts, max_size=3) | st.text(max_size=20) | anything,
        "tool_calls": anything,
        "tool_call_id": anything,
    },
)
KNOWN = dict.fromkeys(" ".join(OPTIONAL).split(), anything)
bodies = st.fixed_dictionaries(
    {"model": st.just("scripted/one") | anything, "messages": st.lists(messages | anything, max_size=3) | anything},
    optional=KNOWN,
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(body=bodies)
def test_no_body_at_all_breaks_the_server(live: Live, body: Any) -> None:
    response = live.http.post(URL, content=json.dumps(body), headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(body=st.binary(max_size=200))
def test_no_bytes_at_all_break_the_server(live: Live, body: bytes) -> None:
    assert live.http.post(URL, content=body, headers=JSON).status_code == 400
