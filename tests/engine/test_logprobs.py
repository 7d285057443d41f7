"""Log-probabilities are the model's own, of prompt and answer alike, and asking for them changes no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.engine.batcher import Batcher
from gale.engine.local import LocalEngine
from gale.engine.request import (
    ContextLengthError,
    Event,
    Finished,
    PromptError,
    PromptScores,
    SamplingParams,
    TextDelta,
    TokenScore,
)
from gale.engine.sequence import Sequence
from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer, user
from tests.tiny_model import make_model

MakeEngine = Callable[..., LocalEngine]
SHORT, LONG = "Where does the river go?", "The wind came over the hill. 门关上了。 " * 30


def teacher(model: Decoder, ids: list[int]) -> Tensor:
    """Log-probabilities [N, V] after each token, from one pass over the whole text."""
    with torch.inference_mode():
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)]))
        return torch.log_softmax(model.logits(hidden).float(), -1)


async def collect(engine: LocalEngine, ids: list[int], **sampling: Any) -> list[PromptScores | Event]:
    return [event async for event in engine.complete(ids, SamplingParams(**sampling))]


def parts(events: list[PromptScores | Event]) -> tuple[list[TokenScore], str, list[TokenScore], Finished]:
    prompt = [score for event in events if isinstance(event, PromptScores) for score in event.scores]
    deltas = [event for event in events if isinstance(event, TextDelta)]
    last = events[-1]
    assert isinstance(last, Finished)
    return prompt, "".join(d.text for d in deltas), [d.score for d in deltas if d.score is not None], last


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["one chunk", "several chunks"])
def test_prompt_and_answer_score_as_in_one_pass_over_both(
    make_engine: MakeEngine, model: Decoder, tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    events = asyncio.run(
        collect(make_engine(), ids, max_tokens=12, temperature=1.7, top_p=0.8, seed=3, logprobs=4, prompt_logprobs=True)
    )
    prompt, _, generated, finished = parts(events)
    assert isinstance(events[0], PromptScores)
    assert [score.token for score in prompt] == ids
    assert prompt[0] == TokenScore(ids[0], None)
    assert len(generated) == finished.usage.completion_tokens == 12
    whole = [*prompt, *generated]
    expected = teacher(model, [score.token for score in whole])
    for place, score in enumerate(whole[1:]):
        assert score.logprob == pytest.approx(float(expected[place, score.token]), abs=1e-4)
        best, likeliest = expected[place].topk(4)
        assert [token for token, _ in score.top] == likeliest.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.tolist(), abs=1e-4)
    total = float(expected[torch.arange(len(whole) - 1), torch.tensor([score.token for score in whole[1:]])].sum())
    assert sum(score.logprob or 0.0 for score in whole) == pytest.approx(total, rel=1e-5)


def test_a_chosen_token_has_the_identical_number_among_the_likeliest(
    make_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(SHORT)
    events = asyncio.run(collect(make_engine(), ids, max_tokens=8, temperature=0, logprobs=1, prompt_logprobs=True))
    prompt, _, generated, _ = parts(events)
    for score in generated:
        assert score.top == ((score.token, score.logprob),)
    for score in prompt[1:]:
        assert (score.top[0][0] == score.token) == (score.top[0][1] == score.logprob)


def test_a_prompt_alone_can_be_scored_up_to_the_whole_context(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SHORT)
    engine = make_engine(make_model(tokenizer, context_length=len(ids)))
    events = asyncio.run(collect(engine, ids, max_tokens=0, logprobs=0, prompt_logprobs=True))
    assert [type(event) for event in events] == [PromptScores, Finished]
    assert events[-1] == Finished("length", events[-1].usage)  # type: ignore[union-attr]
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (len(ids), 0)  # type: ignore[union-attr]
    assert asyncio.run(collect(engine, ids, max_tokens=0)) == events[-1:]
    with pytest.raises(ContextLengthError):
        asyncio.run(collect(engine, ids, max_tokens=1))


@pytest.mark.parametrize("ids", [[], [-1], [3, 10_000]])
def test_tokens_that_are_none_are_refused_before_they_can_harm_others(make_engine: MakeEngine, ids: list[int]) -> None:
    with pytest.raises(PromptError):
        make_engine().complete(ids, SamplingParams())


def test_raw_tokens_are_continued_as_the_chat_is(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    prompt = ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt(user(SHORT))
    told, ended = asyncio.run(answer(engine, SHORT, temperature=0, max_tokens=30))
    for logprobs in (None, 0, 3):
        _, text, scores, finished = parts(
            asyncio.run(collect(engine, prompt, temperature=0, max_tokens=30, logprobs=logprobs))
        )
        assert (text, finished) == (told, ended)
        assert len(scores) == (0 if logprobs is None else 30)


def test_scores_do_not_depend_on_the_company(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    prompts = [tokenizer.encode(text) for text in (SHORT, LONG, "河流", LONG[:200])]
    wanted = {"max_tokens": 3, "temperature": 0, "logprobs": 2, "prompt_logprobs": True}

    async def together() -> list[list[PromptScores | Event]]:
        return list(await asyncio.gather(*(collect(engine, ids, **wanted) for ids in prompts)))

    for ids, events in zip(prompts, asyncio.run(together()), strict=True):
        alone = parts(asyncio.run(collect(engine, ids, **wanted)))
        company = parts(events)
        for one, other in zip([*alone[0], *alone[2]], [*company[0], *company[2]], strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_stop_strings_hold_text_back_but_no_score(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine, ids = make_engine(), tokenizer.encode(SHORT)
    _, whole, _, _ = parts(asyncio.run(collect(engine, ids, temperature=0, max_tokens=40)))
    stop = whole[len(whole) // 2 :][:3]
    _, text, scores, finished = parts(
        asyncio.run(collect(engine, ids, temperature=0, max_tokens=40, stop=(stop,), logprobs=0))
    )
    assert text == whole[: whole.index(stop)]
    assert len(scores) == finished.usage.completion_tokens


def test_an_end_token_is_scored_and_never_shown(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SHORT)
    _, _, scores, _ = parts(asyncio.run(collect(make_engine(), ids, temperature=0, max_tokens=10, logprobs=0)))
    end = scores[6].token
    events = asyncio.run(collect(make_engine(end_tokens=frozenset([end])), ids, temperature=0, logprobs=0))
    _, _, ended, finished = parts(events)
    assert finished.reason == "stop"
    assert ended[-1].token == end
    assert len(ended) == finished.usage.completion_tokens


def test_a_sequence_keeps_what_it_generated_for_callers_of_the_batcher(model: Decoder, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SHORT)
    sequences = [
        Sequence(
            list(ids),
            SamplingParams(max_tokens=9, seed=seed, logprobs=logprobs),
            room=600,
            end_tokens=frozenset(),
            stream=tokenizer.stream(),
            emit=lambda _: None,
        )
        for seed, logprobs in ((1, 0), (2, None))
    ]
    batcher = Batcher(model, max_running=2, max_cached_tokens=10_000, prefill_chunk=64)
    for sequence in sequences:
        batcher.add(sequence)
    while not batcher.idle:
        batcher.step()
    scored, plain = sequences
    assert (len(scored.generated), len(plain.generated), plain.logprobs) == (9, 9, [])
    expected = teacher(model, [*ids, *scored.generated])
    rows = torch.arange(len(ids) - 1, len(ids) + 8)
    assert scored.logprobs == pytest.approx(expected[rows, torch.tensor(scored.generated)].tolist(), abs=1e-4)


def test_the_bytes_of_tokens_join_to_the_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for text in ("Hello 你好 🎉\n\tx", "a<|end|>b"):
        ids = engine.encode(text)
        assert b"".join(engine.token_bytes(token, control_tokens=True) for token in ids).decode() == text
    assert b"".join(map(engine.token_bytes, ids)) == b"ab"
    with pytest.raises(ContextLengthError):
        engine.encode("a" * 8_000_000)
