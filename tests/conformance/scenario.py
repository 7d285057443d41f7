"""The calls: every operation that Gale offers, in an order in which each finds what it needs.

Answers are wanted for their shape alone, so a tiny model with random weights gives them.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from tests.conformance.checker import Checker

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Lima"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "Where does the river go?"}]


def run(checker: Checker, model: str) -> None:
    """Make all the calls."""
    for part in (models, chat, completions, vectors):
        part(checker, model)


def models(checker: Checker, model: str) -> None:
    checker.call("get /models")
    checker.call("get /models/{model}", params={"model": model})


def chat(checker: Checker, model: str) -> None:
    plain = {"model": model, "messages": QUESTION, "max_completion_tokens": 6}
    kinds: list[dict[str, Any]] = [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1, "temperature": 0.5, "top_p": 0.9},
        {"stop": ["."], "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"7": 1}},
        {"tools": [TOOL], "tool_choice": "required", "max_completion_tokens": 60},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    ]
    for kind in kinds:
        checker.call("post /chat/completions", json={**plain, **kind})
        streamed = {**plain, **kind, "stream": True, "stream_options": {"include_usage": True}}
        checker.call("post /chat/completions", json=streamed)


def completions(checker: Checker, model: str) -> None:
    plain = {"model": model, "prompt": "The river goes", "max_tokens": 4}
    for kind in ({}, {"logprobs": 2, "n": 2}, {"prompt": ["The wind", "A door"]}):
        checker.call("post /completions", json={**plain, **kind})
    checker.call("post /completions", json={**plain, "echo": True, "logprobs": 2}, departure=_unscored_first_token)


def vectors(checker: Checker, model: str) -> None:
    for kind in ({}, {"input": ["a", "b"]}):
        checker.call("post /embeddings", json={"model": model, "input": "The wind", **kind})
    packed = {"model": model, "input": "The wind", "encoding_format": "base64"}
    checker.call("post /embeddings", json=packed, departure=_packed_vectors)


def _unscored_first_token(answer: Any) -> None:
    """The first token of an echoed prompt has no score: null, which the document does not allow."""
    for choice in answer["choices"]:
        for name in ("token_logprobs", "top_logprobs"):
            assert choice["logprobs"][name].pop(0) is None


def _packed_vectors(answer: Any) -> None:
    """With base64 a vector is a string, of which the document does not speak."""
    for row in answer["data"]:
        row["embedding"] = np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist()
