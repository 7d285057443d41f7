"""Answers of any length are the JSON that Python writes, and are never written in one long go."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gale.server import json_text

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5), max_leaves=40
)


@given(values, st.integers(0, 7))
def test_pieces_together_are_the_whole(value: Any, depth: int) -> None:
    value = {"list": [value] * 3, "dict": {"": value}}
    assert "".join(json_text._pieces(value, depth)) == json_text.to_json(value)


def answer(tokens: int) -> dict[str, Any]:
    entry = {"token": "风", "logprob": -0.5, "bytes": [1, 2], "top_logprobs": [{"token": "a"}] * 20}
    lists = {"tokens": ["a"] * tokens, "token_logprobs": [-0.5] * tokens}
    choices = [{"index": index, "logprobs": {"content": [entry] * tokens, **lists}} for index in range(100)]
    return {"object": "chat.completion", "choices": choices, "usage": {}}


def test_lists_of_scores_are_written_bit_by_bit() -> None:
    whole = answer(300)
    expected = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    pieces = list(json_text._pieces(whole, json_text._DEPTH))
    assert max(map(len, pieces)) < 64 * len(json.dumps(whole["choices"][0]["logprobs"]["content"][0]))
    assert asyncio.run(json_text.to_json_aside(whole)) == expected


def test_a_number_that_json_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        asyncio.run(json_text.to_json_aside({"choices": [{"logprobs": {"content": [float("nan")] * 200}}]}))
