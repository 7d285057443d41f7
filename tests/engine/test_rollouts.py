"""Rollouts: the answers that serving would give, many at once, leaving the model as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from gale.engine.batcher import Batcher
from gale.engine.local import LocalEngine
from gale.engine.request import ContextLengthError, EngineFailedError, SamplingParams
from gale.engine.rollouts import Rollout, continue_texts, generate
from gale.engine.sequence import Sequence
from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer
from tests.tiny_model import make_model

NOWHERE: frozenset[int] = frozenset()
PROMPTS = ["The wind", "风从山上吹来", "W", "Where does the river go? It goes to the sea.", "门"]


def encoded(tokenizer: Tokenizer, times: int = 1) -> list[list[int]]:
    return [tokenizer.encode(text) for text in PROMPTS] * times


def served(model: Decoder, prompt: list[int], params: SamplingParams, ends: frozenset[int]) -> Sequence:
    """One request through the batcher as the server sets it up, alone."""
    sequence = Sequence(list(prompt), params, room=600, end_tokens=ends, stream=SilentStream(), emit=lambda _: None)
    batcher = Batcher(model, max_running=1, max_cached_tokens=10_000, prefill_chunk=64)
    batcher.add(sequence)
    while not batcher.idle:
        batcher.step()
    return sequence


class SilentStream:
    def push(self, token: int) -> str:
        return ""


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("max_running", [3, 64])
def test_rollouts_are_what_serving_answers(tokenizer: Tokenizer, max_running: int, window: int | None) -> None:
    changes = {"family": "mistral", "sliding_window": window, "qk_norm": False} if window else {}
    model = make_model(tokenizer, **changes)
    prompts = encoded(tokenizer, 4)
    ends = frozenset(range(0, tokenizer.vocabulary_size, 9))  # answers end at all sorts of lengths
    sampling = [
        SamplingParams(
            max_tokens=3 + seed, seed=seed, temperature=(0.0, 0.8, 1.0)[seed % 3], top_p=1 - seed / 40, logprobs=0
        )
        for seed in range(len(prompts))
    ]
    rollouts = generate(model, prompts, sampling, end_tokens=ends, max_running=max_running)
    for prompt, params, rollout in zip(prompts, sampling, rollouts, strict=True):
        alone = served(model, prompt, params, ends)
        assert rollout.prompt == prompt
        assert rollout.tokens == alone.generated
        assert rollout.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert rollout.reason == ("stop" if rollout.tokens[-1] in ends else "length")
    assert {rollout.reason for rollout in rollouts} == {"stop", "length"}


def test_log_probabilities_are_those_of_one_pass_over_everything(model: Decoder, tokenizer: Tokenizer) -> None:
    rollouts = generate(
        model,
        encoded(tokenizer),
        SamplingParams(max_tokens=20, seed=1, temperature=1.3, logprobs=0),
        end_tokens=NOWHERE,
    )
    for rollout in rollouts:
        ids = torch.tensor([*rollout.prompt, *rollout.tokens])
        with torch.inference_mode():
            hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))
            logprobs = torch.log_softmax(model.logits(hidden).float(), -1)
        places = torch.arange(len(rollout.prompt) - 1, len(ids) - 1)
        expected = logprobs[places, torch.tensor(rollout.tokens)]
        assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_same_seeds_give_the_same_bits(model: Decoder, tokenizer: Tokenizer) -> None:
    def once() -> list[Rollout]:
        sampling = [SamplingParams(max_tokens=9, seed=seed, logprobs=0) for seed in range(10)]
        return generate(model, encoded(tokenizer, 2), sampling, end_tokens=NOWHERE)

    first = once()
    torch.manual_seed(5)  # nothing outside counts
    assert once() == first
    assert first[0].tokens != first[5].tokens  # one prompt, two seeds


def test_the_model_is_left_as_it_was(model: Decoder, tokenizer: Tokenizer) -> None:
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        generate(model, encoded(tokenizer), SamplingParams(max_tokens=2), end_tokens=NOWHERE)
        assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    ids = torch.tensor([1, 2, 3])
    model(ids, torch.arange(3), PackedAttention([3])).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "norm" in name)


def test_what_cannot_be_continued_is_refused(model: Decoder) -> None:
    with pytest.raises(ContextLengthError):
        generate(model, [[1], [1] * model.config.context_length], SamplingParams(), end_tokens=NOWHERE)
    for prompt, stop in (([], ()), ([1], ("x",))):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, [prompt], SamplingParams(stop=stop), end_tokens=NOWHERE)
    assert generate(model, [], SamplingParams(), end_tokens=NOWHERE) == []


def test_a_broken_answer_is_an_error(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("bad luck")

    monkeypatch.setattr(Sequence, "accept", broken)
    with pytest.raises(EngineFailedError):
        generate(model, [[1]], SamplingParams(max_tokens=2), end_tokens=NOWHERE)


def test_texts_go_on_as_the_engine_answers(
    make_engine: Callable[..., LocalEngine], model: Decoder, tokenizer: Tokenizer
) -> None:
    [one, two] = continue_texts(model, tokenizer, PROMPTS[:2], 12, chat=True)
    assert one["prompt"] == PROMPTS[0]
    told, _ = asyncio.run(answer(make_engine(), PROMPTS[0], temperature=0, max_tokens=12))
    assert one["text"] == told
    assert [two] == continue_texts(model, tokenizer, PROMPTS[1:2], 12, chat=True)
    [plain] = continue_texts(model, tokenizer, PROMPTS[:1], 12, chat=False)
    start = tokenizer.token_id("<|endoftext|>")
    assert start is not None
    alone = served(model, [start, *tokenizer.encode(PROMPTS[0])], SamplingParams(max_tokens=12, temperature=0), NOWHERE)
    assert plain["text"] == tokenizer.decode(alone.generated)
