"""``/tokenize`` and ``/detokenize`` in vLLM's shapes, over the tiny model's tokenizer."""

from __future__ import annotations

import pytest

from gale.text.template import Message
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live

TEXT = "The wind 风从山上吹来 🎉"


def test_a_text_becomes_the_tokens_that_completions_read_and_a_text_again(tiny: Live, tokenizer: Tokenizer) -> None:
    said = tiny.http.post("/tokenize", json={"model": "tiny", "prompt": TEXT + "<|end|>"}).json()
    ids = tokenizer.encode(TEXT + "<|end|>", control_tokens=True)
    assert said == {"count": len(ids), "max_model_len": 700, "tokens": ids, "token_strs": None}
    assert tiny.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": TEXT + "<|end|>"}


def test_a_conversation_becomes_the_tokens_that_chat_reads(tiny: Live) -> None:
    messages = [{"role": "user", "content": TEXT}]
    said = tiny.http.post("/tokenize", json={"messages": messages, "add_special_tokens": False}).json()
    chat = tiny.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1}).json()
    assert said["count"] == len(said["tokens"]) == chat["usage"]["prompt_tokens"]
    assert said["tokens"] == tiny.engine.encode_chat([Message(role="user", content=TEXT)])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "prompt"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": 5}, 400, "prompt"),
        ({"messages": []}, 400, "messages"),
        ({"prompt": "a", "return_token_strs": True}, 400, "return_token_strs"),
        ({"prompt": "x" * 1_000_000}, 400, "messages"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(tiny: Live, body: object, status: int, param: str) -> None:
    answer = tiny.http.post("/tokenize", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


def test_numbers_that_are_no_tokens_are_refused_or_empty(tiny: Live) -> None:
    assert tiny.http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert tiny.http.post("/detokenize", json={"tokens": [2**40]}).json() == {"prompt": ""}
    assert tiny.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_the_model_list_says_how_long_the_context_is(tiny: Live) -> None:
    assert tiny.http.get("/v1/models").json()["data"][0]["max_model_len"] == 700


def test_scores_name_tokens_by_id_where_asked(tiny: Live, tokenizer: Tokenizer) -> None:
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 2}
    body["return_tokens_as_token_ids"] = True
    shown = tiny.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert shown["tokens"] == [f"token_id:{token}" for token in tokenizer.encode(TEXT)]
    assert all(name.startswith("token_id:") for top in shown["top_logprobs"][1:] for name in top)
