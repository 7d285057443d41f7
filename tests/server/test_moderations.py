"""``/v1/moderations`` with the official client over the weights that Gale comes with, and with everything else."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import ModerationModel
from openai.types.moderation import Categories

from gale.server.openai_moderations import ALIASES, CATEGORIES, MOST_CHARACTERS, MOST_INPUTS
from tests.server.live import Live

JUDGED = {"harassment", "hate"}
RUDE = ["You are a stupid bitch and I hate you.", "你们这些恶心的东西都是垃圾，滚出去"]
KIND = ["Could you tell me when the library opens tomorrow?", "请问图书馆明天几点开门？"]


@pytest.fixture
def client(live: Live) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key="anything at all", max_retries=0)


def test_rude_and_kind_texts_are_told_apart_in_both_languages(client: OpenAI) -> None:
    answer = client.moderations.create(input=[*RUDE, *KIND])
    assert answer.model == "gale-moderation"
    assert answer.id.startswith("modr-")
    assert [result.flagged for result in answer.results] == [True, True, False, False]
    for result in answer.results[:2]:
        assert result.categories.harassment
        assert result.category_scores.harassment > 0.7
    for result in answer.results[2:]:
        assert not any(result.categories.model_dump().values())
        assert result.category_scores.harassment < 0.3


def test_every_category_has_its_place_and_what_is_not_judged_says_so(client: OpenAI) -> None:
    answer = client.moderations.create(input=RUDE[0], model="omni-moderation-latest")
    [result] = answer.results
    names = {field.alias or name for name, field in Categories.model_fields.items()}
    assert names == set(CATEGORIES)
    for part in (result.categories, result.category_scores, result.category_applied_input_types):
        assert part.model_dump(by_alias=True).keys() == names
    types = result.category_applied_input_types.model_dump(by_alias=True)
    scores = result.category_scores.model_dump(by_alias=True)
    assert {name for name, kinds in types.items() if kinds == ["text"]} == JUDGED
    assert {types[name] == [] and scores[name] == 0.0 for name in names - JUDGED} == {True}
    assert set(answer.model_extra["judged_categories"]) == JUDGED
    assert result.flagged == any(result.categories.model_dump().values())


def test_every_way_to_write_one_text_is_judged_alike(client: OpenAI) -> None:
    ways: list[Any] = [RUDE[1], [RUDE[1]], [{"type": "text", "text": RUDE[1]}]]
    scores = [client.moderations.create(input=way).results[0].category_scores.harassment for way in ways]
    assert scores == pytest.approx([scores[0]] * 3, abs=0.01)
    # Parts are one input; the one that offends most counts.
    parts: Any = [{"type": "text", "text": text} for text in (KIND[0], RUDE[1], KIND[1])]
    [together] = client.moderations.create(input=parts).results
    assert together.category_scores.harassment == pytest.approx(scores[0], abs=0.01)


def test_offence_at_the_end_of_a_long_text_is_found(client: OpenAI) -> None:
    [result] = client.moderations.create(input=f"{KIND[0]} " * 200 + RUDE[0]).results
    assert result.flagged


@pytest.mark.parametrize("model", [None, "gale-moderation", *ALIASES])
def test_names_that_are_taken(live: Live, model: str | None) -> None:
    answer = live.http.post("/v1/moderations", json={"input": "Hello", "model": model})
    assert answer.status_code == 200
    assert answer.json()["model"] == "gale-moderation"
    assert "omni-moderation-latest" in get_args(ModerationModel)


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.moderations.create(input="Hello", model="text-moderation-007")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "gale-moderation" in caught.value.message


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        (None, "input", "must be a string"),
        (7, "input", "must be a string"),
        ({}, "input", "must be a string"),
        ([], "input", "at least one"),
        ("", "input", "must not be empty"),
        (["a", ""], "input[1]", "must not be empty"),
        (["a", 7], "input[0]", "strings only"),
        ([["a"]], "input[0]", "strings only"),
        ([{"type": "text"}], "input[0].text", "needs its text"),
        ([{"type": "text", "text": ""}], "input[0].text", "not empty"),
        ([{"type": "text", "text": 1}], "input[0].text", "needs its text"),
        ([{"type": "text", "text": "a"}, IMAGE], "input[1].type", "images are not supported"),
        ([{"type": "audio"}], "input[0]", "type 'text' only"),
        (["a"] * (MOST_INPUTS + 1), "input", f"at most {MOST_INPUTS}"),
        (["a" * 1000] * (MOST_CHARACTERS // 1000 + 1), "input", f"at most {MOST_CHARACTERS:,}"),
    ],
)
def test_input_that_cannot_be_judged_is_refused_by_name(live: Live, given: Any, param: str, says: str) -> None:
    answer = live.http.post("/v1/moderations", json={"input": given})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("model", [7, ["gale-moderation"], True])
def test_a_model_that_is_no_name_is_refused(live: Live, model: Any) -> None:
    answer = live.http.post("/v1/moderations", json={"input": "a", "model": model})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_a_body_without_input_and_one_that_is_no_json(live: Live) -> None:
    answer = live.http.post("/v1/moderations", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "missing_required_parameter")
    answer = live.http.post("/v1/moderations", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert live.http.get("/v1/moderations").status_code == 405


def test_text_of_any_kind_is_judged(client: OpenAI) -> None:
    odd = ["\n", "🎉🎉", "﷽" * 50, "a" * 20_000, "<|end|><|user|>", "\u202e\u200b", "{}", "0"]
    assert len(client.moderations.create(input=odd).results) == len(odd)


def test_many_at_once_and_the_server_goes_on_answering_others(live: Live) -> None:
    async def ask() -> None:
        client = AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        answers = [client.moderations.create(input=[RUDE[n % 2], KIND[n % 2]] * 8) for n in range(16)]
        chat = client.chat.completions.create(model="scripted/one", messages=[{"role": "user", "content": "Hi"}])
        *found, said = await asyncio.gather(*answers, chat)
        assert said.choices[0].message.content == "Hi"
        for answer in found:
            assert [result.flagged for result in answer.results] == [True, False] * 8

    asyncio.run(ask())
