"""``/v1/completions`` with the official client against a real server with a real (tiny) model."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from gale.engine.local import LocalEngine
from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, eventually

PROMPT = "The wind came over the hill 你好 🎉 and"


@pytest.fixture
def client(tiny: Live) -> OpenAI:
    return OpenAI(base_url=f"{tiny.url}/v1", api_key="anything at all", max_retries=0)


def complete(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 8, **options})


def test_echoed_scores_are_those_of_the_model_s_own_forward_pass(
    client: OpenAI, model: Decoder, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(PROMPT)
    with torch.inference_mode():
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)]))
        expected = torch.log_softmax(model.logits(hidden), -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    for prompt in (PROMPT, ids):
        answer = complete(client, prompt, max_tokens=0, echo=True, logprobs=2)
        scores = answer.choices[0].logprobs
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert scores.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
        assert sum(scores.token_logprobs[1:]) == pytest.approx(float(expected.sum()), abs=1e-4)
        assert answer.choices[0].text == PROMPT
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)


def test_token_lists_get_no_token_added_and_one_more_score_than_the_prompt(client: OpenAI) -> None:
    """What lm-evaluation-harness sends, and the length that it cuts its slices from."""
    answer = complete(client, [[20, 21, 22], [30, 31]], max_tokens=1, logprobs=1, echo=True, seed=1234)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [len(choice.logprobs.token_logprobs) for choice in answer.choices] == [4, 3]


def test_the_chosen_token_is_among_the_top_with_the_identical_number(client: OpenAI) -> None:
    answer = complete(client, temperature=1.5, seed=4, max_tokens=20, logprobs=2, echo=True)
    scores = answer.choices[0].logprobs
    outside = 0
    for token, logprob, top in list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True))[1:]:
        assert logprob in top.values()
        assert top[token] == logprob
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert len(top) in (2, 3)
        outside += len(top) == 3
    assert outside


def test_tokens_stand_where_their_offsets_say(client: OpenAI) -> None:
    choice = complete(client, max_tokens=12, logprobs=0, echo=True).choices[0]
    scores = choice.logprobs
    assert choice.text.startswith(PROMPT)
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    pieces = [token for token in scores.tokens if token.startswith("bytes:\\x")]
    assert pieces, "the emoji is made of several tokens"
    assert scores.text_offset == sorted(scores.text_offset)
    assert scores.text_offset[0] == 0


def test_greedy_completions_are_the_chat_s(client: OpenAI, tokenizer: Tokenizer) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Where?"}], temperature=0, max_tokens=20
    )
    template = ChatTemplate(tokenizer.chat_template or "", tokenizer)
    ids = template.prompt([Message(role="user", content="Where?")])
    rendered = tokenizer.decode(ids, control_tokens=True)
    for prompt in (ids, rendered):
        answer = complete(client, prompt, max_tokens=20)
        assert answer.choices[0].text == chat.choices[0].message.content
        assert answer.choices[0].logprobs is None
        assert answer.object == "text_completion"
        assert answer.usage.prompt_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"echo": True, "logprobs": 3}, {"logprobs": 0}])
def test_a_stream_says_the_same(client: OpenAI, options: dict[str, Any]) -> None:
    prompts = [PROMPT, "River", "门"]
    wanted = {**options, "n": 2, "temperature": 1, "seed": 9}
    whole = complete(client, prompts, **wanted)
    chunks = list(complete(client, prompts, stream=True, stream_options={"include_usage": True}, **wanted))
    *chunks, usage = chunks
    assert usage.choices == []
    assert usage.usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in [*chunks, usage]}) == 1
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
        assert all(part.finish_reason is None for part in parts[:-1])
        if "logprobs" in options:
            joined = [value for part in parts for value in part.logprobs.token_logprobs]
            assert joined == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
            assert [value for part in parts for value in part.logprobs.tokens] == choice.logprobs.tokens


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    texts = [[c.text for c in complete(client, n=3, temperature=1, seed=5).choices] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    answer = complete(client, ["a", "b"], n=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 6 * 8


def test_stop_strings_of_any_number_end_the_text(client: OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    choice = complete(client, max_tokens=40, stop=["never", "ever", "at", "all", "or", stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: min(whole.find(s) for s in (stop, "at", "all", "or") if s in whole)]
    assert complete(client, stop=[]).choices[0].finish_reason == "length"


def test_a_form_of_the_answer_is_for_chat_and_that_is_said(client: OpenAI) -> None:
    for name, value in {"guided_regex": "[0-9]+", "response_format": {"type": "json_object"}}.items():
        with pytest.raises(openai.BadRequestError, match=f"'{name}'.*not supported.*/v1/chat/completions") as caught:
            complete(client, "River", extra_body={name: value})
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
    complete(client, "River", extra_body={"response_format": {"type": "text"}, "guided_json": None, "mine": 1})


def test_more_prompts_than_run_at_once_are_all_answered(client: OpenAI) -> None:
    alone = complete(client, "River", max_tokens=2).choices[0].text
    answer = complete(client, ["River"] * 70, max_tokens=2)
    assert [choice.text for choice in answer.choices] == [alone] * 70


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("suffix", "end", "unsupported_parameter"),
        ("best_of", 3, "unsupported_parameter"),
        ("logit_bias", {"100000": 1}, "invalid_value"),
        ("presence_penalty", 2.5, "invalid_value"),
        ("frequency_penalty", -3, "invalid_value"),
        ("prompt", [], "invalid_value"),
        ("prompt", "", "invalid_value"),
        ("prompt", [[1], []], "invalid_value"),
        ("prompt", ["a", 1], "invalid_value"),
        ("prompt", [True], "invalid_value"),
        ("prompt", [1.5], "invalid_value"),
        ("prompt", [-1], "invalid_value"),
        ("prompt", [10**6], "invalid_value"),
        ("prompt", ["a"] * 257, "invalid_value"),
        ("prompt", 3, "invalid_value"),
        ("prompt", "a b " * 700, "context_length_exceeded"),
        ("max_tokens", -1, "invalid_value"),
        ("max_tokens", 701, "invalid_value"),
        ("logprobs", 21, "invalid_value"),
        ("logprobs", True, "invalid_type"),
        ("n", 0, "invalid_value"),
        ("n", 257, "invalid_value"),
        ("temperature", 3, "invalid_value"),
        ("echo", 1, "invalid_type"),
        ("stop", ["a"] * 33, "invalid_value"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: OpenAI, field: str, value: Any, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{field: value})
    assert (caught.value.param, caught.value.code) == (field, code)


def test_refusals_name_the_prompt_at_fault_and_are_http_errors_even_for_streams(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, [[5], [6] * 700], stream=stream)
        assert caught.value.param == "prompt[1]"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a", stream=stream)
    assert complete(client, "a").choices[0].text


def test_numbers_beyond_any_vocabulary_are_refused_also_where_they_are_to_be_echoed(client: OpenAI) -> None:
    for token in (10**6, 2**32, 2**63 - 1):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, [5, token], echo=True)
        assert caught.value.param == "prompt"


def test_more_scores_than_a_server_can_hold_are_refused(client: OpenAI) -> None:
    """A few bytes could ask for gigabytes."""
    for options in ({"max_tokens": 600}, {"echo": True, "max_tokens": 0}):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, [7] * 600 if "echo" in options else "a", n=256, logprobs=20, **options)
        assert (caught.value.param, caught.value.code) == ("logprobs", "invalid_value")
    assert len(complete(client, "a", n=256, max_tokens=1, logprobs=20).choices) == 256


def test_a_client_that_leaves_ends_all_its_choices(
    tiny: Live, engine: LocalEngine, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.02)
        return forward(*arguments)

    monkeypatch.setattr(model, "forward", slow)
    body = {"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 600, "stream": True}
    with tiny.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # dropping it would close the connection
        next(lines)
        assert engine._unfinished == 3
    eventually(lambda: engine._unfinished == 0)


def test_the_last_event_is_done(tiny: Live) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True}
    events = tiny.http.post("/v1/completions", json=body).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_a_chat_s_log_probabilities_are_the_completion_s(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt([Message(role="user", content="门 🎉?")])
    expected = complete(client, ids, max_tokens=12, logprobs=3).choices[0].logprobs
    wanted: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "门 🎉?"}], **wanted}
    whole = client.chat.completions.create(**ask).choices[0].logprobs.content
    streamed = [
        score
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for score in chunk.choices[0].logprobs.content
    ]
    for content in (whole, streamed):
        assert [score.token for score in content] == expected.tokens
        assert [score.logprob for score in content] == pytest.approx(expected.token_logprobs, abs=1e-4)
        assert [len(score.top_logprobs) for score in content] == [3] * 12
        assert all(score.top_logprobs[0].logprob == score.logprob for score in content)
        for score in content:
            if not score.token.startswith("bytes:"):
                assert bytes(score.bytes).decode() == score.token


def test_sampling_parameters_beyond_openai_s_shape_the_text(client: OpenAI) -> None:
    greedy = complete(client, max_tokens=12).choices[0].text
    for extra in ({"top_k": 1}, {"min_p": 1.0}, {"top_k": -1, "top_p": 0.0}):
        assert complete(client, max_tokens=12, temperature=2, seed=1, extra_body=extra).choices[0].text == greedy
    assert complete(client, max_tokens=12, extra_body={"repetition_penalty": 3.0}).choices[0].text != greedy
    forced = complete(client, max_tokens=5, logit_bias={"30": 100}, logprobs=0).choices[0].logprobs.tokens
    assert len(set(forced)) == 1
    ended = complete(client, logit_bias={"30": 100}, extra_body={"stop_token_ids": [30]})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1


def test_what_was_read_before_is_counted(client: OpenAI) -> None:
    prompt = [int(token) for token in torch.randint(300, (200,), generator=torch.Generator().manual_seed(8))]
    usages = [complete(client, prompt, max_tokens=2).usage for _ in range(2)]
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, 199]
    messages = [{"role": "user", "content": "Where does the river go? " * 9}]
    answers = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, n=2)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached[0] < 16
    assert cached[1] == answers[1].usage.prompt_tokens - 1
