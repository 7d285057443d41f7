"""``/v1/embeddings`` with the official client, ``/v1/rerank`` and ``/v1/decisions``, over a real (tiny) model."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import openai
import pytest
from openai import OpenAI

from gale.assistant.rerank import rerank
from gale.engine.local import LocalEngine
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live

TEXTS = ["Where does the river go?", "The wind came over the hill 你好 🎉", "a", "<|end|>"]


@pytest.fixture
def client(tiny: Live) -> OpenAI:
    return OpenAI(base_url=f"{tiny.url}/v1", api_key="anything at all", max_retries=0)


def embed(client: OpenAI, texts: Any, **options: Any) -> Any:
    return client.embeddings.create(model="tiny", input=texts, **options)


def near(vector: list[float]) -> Any:
    return pytest.approx(vector, abs=1e-5)


def test_every_way_to_ask_gives_the_engine_s_vectors_in_order(
    client: OpenAI, engine: LocalEngine, tokenizer: Tokenizer
) -> None:
    expected = asyncio.run(engine.embed(TEXTS))
    ids = [tokenizer.encode(text) for text in TEXTS]
    for inputs in (TEXTS, ids):
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = embed(client, inputs, **encoding)
            assert (answer.object, answer.model) == ("list", "tiny")
            assert [item.index for item in answer.data] == [0, 1, 2, 3]
            assert {item.object for item in answer.data} == {"embedding"}
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == expected.prompt_tokens
            for item, vector in zip(answer.data, expected.vectors, strict=True):
                shown = item.embedding
                if isinstance(shown, str):  # asked for base64, the client hands it on
                    data = base64.b64decode(shown)
                    shown = list(struct.unpack(f"<{len(data) // 4}f", data))
                assert shown == near(vector)
                assert sum(number * number for number in shown) == pytest.approx(1, abs=1e-5)
    for one in (TEXTS[1], ids[1]):
        assert embed(client, one).data[0].embedding == near(expected.vectors[1])


def test_dimensions_and_pooling_can_be_chosen(client: OpenAI, engine: LocalEngine) -> None:
    short = embed(client, TEXTS, dimensions=8).data
    assert [item.embedding for item in short] == list(map(near, asyncio.run(engine.embed(TEXTS, dimensions=8)).vectors))
    last = embed(client, TEXTS[0], extra_body={"pooling": "last", "normalize": False}).data[0].embedding
    expected = asyncio.run(engine.embed(TEXTS[:1], pooling="last", normalise=False)).vectors[0]
    assert last == near(expected)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": [[1], []]}, "input", "invalid_value"),
        ({"input": [1, "a"]}, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": [[5] * 600] * 501}, "input", "invalid_value"),
        ({"input": [100_000]}, "input", "invalid_value"),
        ({"input": ["a", [5] * 701]}, "input", "invalid_value"),
        ({"input": [[5], [5] * 701]}, "input[1]", "context_length_exceeded"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "unsupported_parameter"),
        ({"input": "a", "input_type": "search_query"}, "input_type", "unsupported_parameter"),
        ({"input": "a" * 1_000_000}, "input", "context_length_exceeded"),
        ({"dimensions": 0}, "dimensions", "invalid_value"),
        ({"dimensions": 49}, "dimensions", "invalid_value"),
        ({"encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"pooling": "max"}, "pooling", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_bad_embedding_requests_name_the_field(tiny: Live, fields: dict[str, Any], param: str, code: str) -> None:
    response = tiny.http.post("/v1/embeddings", json={"model": "tiny", "input": "a", **fields})
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_nulls_are_as_if_left_out(tiny: Live) -> None:
    fields = ("encoding_format", "dimensions", "pooling", "normalize", "user")
    bodies = [{"model": "tiny", "input": "a"}, {"model": "tiny", "input": "a", **dict.fromkeys(fields)}]
    first, second = (tiny.http.post("/v1/embeddings", json=body) for body in bodies)
    assert first.status_code == 200
    assert first.json() == second.json()


def test_a_reranking_is_the_assistant_s_in_the_shape_of_others(tiny: Live, engine: LocalEngine) -> None:
    documents = ["It goes to the sea.", {"text": "The door fell shut."}, "河流去大海。"]
    plain = ["It goes to the sea.", "The door fell shut.", "河流去大海。"]
    for fields, options in (
        ({}, {}),
        ({"method": "embedding"}, {"method": "embedding"}),
        ({"prompt": "{query} {document}"}, {"prompt": "{query} {document}"}),
    ):
        expected = asyncio.run(rerank(engine, "Where?", plain, **options))  # type: ignore[arg-type]
        body = {"model": "tiny", "query": "Where?", "documents": documents, **fields}
        answer = tiny.http.post("/v1/rerank", json=body).json()
        assert [each["index"] for each in answer["results"]] == [index for index, _ in expected.scores]
        assert [each["relevance_score"] for each in answer["results"]] == near([score for _, score in expected.scores])
        assert all(each["document"] == {"text": plain[each["index"]]} for each in answer["results"])
        assert answer["usage"] == {"prompt_tokens": expected.prompt_tokens, "total_tokens": expected.prompt_tokens}
        assert (answer["model"], answer["id"][:7]) == ("tiny", "rerank-")
        short = tiny.http.post("/v1/rerank", json={**body, "top_n": 1, "return_documents": False}).json()
        assert len(short["results"]) == 1
        assert "document" not in short["results"][0]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"query": ""}, "query", "invalid_value"),
        ({"documents": []}, "documents", "invalid_value"),
        ({"documents": ["a", {"title": "b"}]}, "documents[1]", "invalid_type"),
        ({"documents": ["a", "b " * 900]}, "documents[1]", "context_length_exceeded"),
        ({"query": "b " * 900, "method": "embedding"}, "query", "context_length_exceeded"),
        ({"top_n": 0}, "top_n", "invalid_value"),
        ({"method": "magic"}, "method", "invalid_value"),
        ({"prompt": "{query} alone"}, "prompt", "invalid_value"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_bad_rerank_requests_name_the_field(tiny: Live, fields: dict[str, Any], param: str, code: str) -> None:
    response = tiny.http.post("/v1/rerank", json={"model": "tiny", "query": "a", "documents": ["a"], **fields})
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_a_decision_says_how_likely_each_label_is(tiny: Live, engine: LocalEngine, client: OpenAI) -> None:
    labels = [" the sea", " the hill", " nowhere at all", "x"]
    messages = [{"role": "user", "content": "Where does the river go?"}]
    chat = engine.encode_chat([Message(role="user", content=messages[0]["content"])])
    raw = engine.encode("The river goes to")
    for fields, prompt in (
        ({"messages": messages}, chat),
        ({"prompt": "The river goes to"}, raw),
        ({"prompt": raw}, raw),
    ):
        answer = tiny.http.post("/v1/decisions", json={"model": "tiny", "labels": labels, **fields}).json()
        shown = {each["label"]: each for each in answer["labels"]}
        assert list(shown) == labels
        for label in labels:
            ids = [*prompt, *engine.encode(label)]
            scores = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
            logprobs = scores.choices[0].logprobs.token_logprobs[len(prompt) :]  # type: ignore[union-attr,index]
            assert shown[label]["logprob"] == pytest.approx(sum(logprobs), abs=1e-4)
        assert sum(each["probability"] for each in answer["labels"]) == pytest.approx(1)
        assert answer["label"] == max(labels, key=lambda label: shown[label]["probability"])
        assert (answer["object"], answer["model"]) == ("decision", "tiny")
        assert answer["usage"]["total_tokens"] > len(prompt)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "invalid_value"),
        ({"prompt": "a", "labels": []}, "labels", "invalid_value"),
        ({"prompt": "a", "labels": ["a", "a"]}, "labels", "invalid_value"),
        ({"prompt": "a", "labels": ["a", ""]}, "labels[1]", "invalid_value"),
        ({"prompt": "a", "labels": ["a" * 257]}, "labels[0]", "invalid_value"),
        ({"prompt": "a", "labels": ["a"] * 257}, "labels", "invalid_value"),
        ({"prompt": ["a", "b"]}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": [100_000]}, "prompt", "invalid_value"),
        ({"prompt": [5] * 701}, "prompt", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"prompt": "a", "model": "other"}, "model", "model_not_found"),
    ],
)
def test_bad_decision_requests_name_the_field(tiny: Live, fields: dict[str, Any], param: str, code: str) -> None:
    response = tiny.http.post("/v1/decisions", json={"model": "tiny", "labels": ["a", "b"], **fields})
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_an_engine_that_cannot_read_alone_has_no_such_routes(live: Live, client: OpenAI) -> None:
    for path in ("embeddings", "rerank", "decisions"):
        response = live.http.post(f"/v1/{path}", json={"model": "scripted/one"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "unknown_url"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")


def test_what_other_servers_have_and_gale_lacks_is_refused_by_name_and_the_rest_ignored(tiny: Live) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "embeddings": {"input": "a"},
        "rerank": {"query": "a", "documents": ["b"]},
        "decisions": {"prompt": "a", "labels": ["b"]},
    }
    for path, body in bodies.items():
        body |= {"model": "tiny", "my_own": {"deep": [1]}, "truncation": None}
        assert tiny.http.post(f"/v1/{path}", json=body).status_code == 200
        if path != "decisions":
            refused = tiny.http.post(f"/v1/{path}", json={**body, "truncation": True})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "truncation")
    refused = tiny.http.post("/v1/rerank", json={**bodies["rerank"], "top_k": 1})
    assert "Use 'top_n'." in refused.json()["error"]["message"]


def test_a_thousand_vectors_are_valid_json_in_one_answer(tiny: Live) -> None:
    response = tiny.http.post("/v1/embeddings", json={"model": "tiny", "input": ["a b c"] * 1000})
    content = json.loads(response.content)
    assert [item["index"] for item in content["data"]] == list(range(1000))
    assert set(content) == {"object", "data", "model", "usage"}
