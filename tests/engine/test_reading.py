"""Reading alone: vectors are those of transformers, decisions what the prompt's own scores say, and nobody waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gale.engine.batcher import Batcher
from gale.engine.local import LocalEngine
from gale.engine.reading import LabelScorer, Pool
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    PromptError,
    PromptScores,
    Reader,
    SamplingParams,
    UnknownAdapterError,
)
from gale.engine.sequence import Sequence
from gale.model.checkpoint import load_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer, user
from tests.tiny_model import MIXTURE, make_model, save_adapter_folder, save_folder

MakeEngine = Callable[..., LocalEngine]
TEXTS = ["Where does the river go?", "a", "The wind came over the hill. 门关上了。 " * 30, "河流去大海。"]
LABELS = [" the sea", " the hill", " nowhere", "海", " the", "x", " the seventh hill 🎉"]


def vectors(engine: LocalEngine, inputs: Any, **options: Any) -> torch.Tensor:
    return torch.tensor(asyncio.run(engine.embed(inputs, **options)).vectors)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", [{}, {"family": "mistral", "qk_norm": False, "sliding_window": 40}, MIXTURE])
def test_vectors_are_those_of_transformers(
    make_engine: MakeEngine, tokenizer: Tokenizer, tmp_path: Path, pooling: str, kind: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_folder(tokenizer, tmp_path, **kind)
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = [tokenizer.encode(text) for text in TEXTS]
    with torch.no_grad():
        states = [theirs(torch.tensor([each])).last_hidden_state[0] for each in ids]
    expected = torch.stack([state.mean(0) if pooling == "mean" else state[-1] for state in states])
    engine = make_engine(load_model(folder, dtype=torch.float32))
    for inputs in (TEXTS, ids):
        plain = vectors(engine, inputs, pooling=pooling, normalise=False)
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            vectors(engine, inputs, pooling=pooling), F.normalize(expected, dim=-1), rtol=0, atol=1e-4
        )
    short = vectors(engine, TEXTS, pooling=pooling, dimensions=7)
    torch.testing.assert_close(short, F.normalize(expected[:, :7], dim=-1), rtol=0, atol=1e-4)
    assert asyncio.run(engine.embed(TEXTS)).prompt_tokens == sum(map(len, ids))


def test_a_folder_says_how_it_pools_and_its_tokenizer_what_stands_around_a_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As those of Qwen3-Embedding do: the last token counts, and it is an end token that the tokenizer adds."""
    save_folder(tokenizer, tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [end], "tokens": ["<|end|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    engine = LocalEngine.load(tmp_path)
    try:
        text = "a <|end|> b"  # what people write is no control token
        ids = [*tokenizer.encode(text), end]
        assert engine.encode_text(text) == ids
        assert end not in ids[:-1]
        assert torch.equal(vectors(engine, [text]), vectors(engine, [ids], pooling="last"))
        assert not torch.equal(vectors(engine, [text]), vectors(engine, [ids], pooling="mean"))
    finally:
        asyncio.run(engine.close())


@pytest.mark.parametrize("kind", [{}, MIXTURE])
def test_a_decision_is_the_sum_of_the_scores_of_each_label_s_tokens(
    make_engine: MakeEngine, tokenizer: Tokenizer, kind: dict[str, Any]
) -> None:
    engine = make_engine(make_model(tokenizer, **kind))
    ways = [tokenizer.encode(label) for label in LABELS]
    assert min(map(len, ways)) == 1
    assert max(map(len, ways)) > 2

    async def sums(prompt: list[int]) -> list[float]:
        found = []
        for way in ways:
            params = SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True)
            events = [event async for event in engine.complete(prompt + way, params)]
            assert isinstance(events[0], PromptScores)
            found.append(sum(score.logprob or 0 for score in events[0].scores[len(prompt) :]))
        return found

    for text in TEXTS:
        prompt = tokenizer.encode(text)
        decision = asyncio.run(engine.decide(prompt, LABELS))
        expected = asyncio.run(sums(prompt))
        assert decision.logprobs == pytest.approx(expected, abs=1e-4)
        assert decision.probabilities == pytest.approx(torch.tensor(expected).softmax(0).tolist(), abs=1e-4)
        assert sum(decision.probabilities) == pytest.approx(1)


def read(model: Decoder, prompt: list[int], scorer: LabelScorer, chunk: int) -> list[int]:
    """Run a decision alone and return how many tokens each step read."""
    counts: list[int] = []
    forward = model.forward
    model.forward = lambda ids, *rest: (counts.append(len(ids)), forward(ids, *rest))[1]  # type: ignore[method-assign]
    try:
        batcher = Batcher(model, max_running=1, max_cached_tokens=10_000, prefill_chunk=chunk)
        batcher.add(observed(prompt, scorer))
        while not batcher.idle:
            batcher.step()
    finally:
        model.forward = forward  # type: ignore[method-assign]
    return counts


def observed(prompt: list[int], observer: LabelScorer | Pool, emit: Callable[[Any], None] = lambda _: None) -> Sequence:
    return Sequence(
        list(prompt),
        SamplingParams(max_tokens=0),
        room=100,
        end_tokens=frozenset(),
        stream=None,  # type: ignore[arg-type]
        emit=emit,
        observer=observer,
    )


def test_the_prompt_is_read_once_and_what_labels_share_once_too(model: Decoder, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXTS[0])
    labels = [[5], [5, 6, 7], [5, 6], [5, 6, 7, 8], [9, 10], [11], [5, 12, 13]]
    scorer = LabelScorer(len(prompt), labels, model.logits)
    # Behind the prompt: 5 6 7 (which scores four labels), 5 12, 9.
    assert read(model, prompt, scorer, chunk=64) == [len(prompt), 3, 2, 1]
    assert (scorer.label_tokens, scorer.further_tokens) == (6, 3)
    whole = scorer.logprobs()
    single = LabelScorer(len(prompt), [[5], [11], [12]], model.logits)
    assert read(model, prompt, single, chunk=64) == [len(prompt)]
    assert single.logprobs()[:2] == pytest.approx([whole[0], whole[5]], abs=1e-4)
    chunked = LabelScorer(len(prompt), labels, model.logits)
    assert max(read(model, prompt, chunked, chunk=2)) == 2
    assert chunked.logprobs() == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_decision_that_loses_its_memory_goes_on_as_if_nothing_had_been(model: Decoder, steps: int) -> None:
    """Also where another sequence has read the very label meanwhile, which could be copied then, but not be scored."""
    prompt, labels = [7 + place % 60 for place in range(90)], [[5, 6, 7, 8, 9], [11, 12, 13], [14]]
    expected = LabelScorer(len(prompt), labels, model.logits)
    read(model, prompt, expected, chunk=64)
    batcher = Batcher(model, max_running=4, max_cached_tokens=10_000, prefill_chunk=64, prefix_cache=True)
    for label in labels:
        other = LabelScorer(len(prompt) + len(label), [[20]], model.logits)
        batcher.add(observed(prompt + label, other))
    while not batcher.idle:
        batcher.step()
    scorer = LabelScorer(len(prompt), labels, model.logits)
    batcher.add(decision := observed(prompt, scorer))
    batcher._prefill_chunk = 2  # so that it is in the middle of a label after some of the steps
    for _ in range(steps):
        batcher.step()
    if not decision.finished:
        batcher._preempt(decision)
    while not batcher.idle:
        batcher.step()
    assert scorer.logprobs() == pytest.approx(expected.logprobs(), abs=1e-4)


def test_what_reads_does_not_hold_up_what_writes(model: Decoder, tokenizer: Tokenizer) -> None:
    """A running answer gets a token in every step, and no step reads more than a chunk beside it."""
    batcher = Batcher(model, max_running=8, max_cached_tokens=10_000, prefill_chunk=32)
    given: list[Any] = []
    answering = Sequence(
        [20, 21],
        SamplingParams(temperature=0, max_tokens=60, logprobs=0),
        room=600,
        end_tokens=frozenset(),
        stream=tokenizer.stream(),
        emit=given.append,
    )
    batcher.add(answering)
    batcher.step()
    finished: list[Any] = []
    prompt = tokenizer.encode(TEXTS[2])
    observers = [Pool("mean"), LabelScorer(len(prompt), [[5, 6], [7, 8]], model.logits), Pool("last")]
    for observer in observers:
        batcher.add(observed(prompt, observer, finished.append))
    steps = 0
    while len(finished) < 3:
        before = len(answering.generated)
        batcher.step()
        steps += 1
        assert len(answering.generated) == before + 1
    assert steps >= 3 * len(prompt) // 32


def test_reading_is_the_same_alone_and_in_company(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    prompts = [tokenizer.encode(text) for text in TEXTS]

    async def together() -> list[Any]:
        return list(
            await asyncio.gather(
                answer(engine, TEXTS[0], temperature=0, max_tokens=40),
                engine.embed(TEXTS * 8),
                *(engine.decide(prompt, LABELS) for prompt in prompts),
                answer(engine, TEXTS[2], temperature=0, max_tokens=40),
            )
        )

    first, embedded, *decisions, last = asyncio.run(together())
    assert first == asyncio.run(answer(engine, TEXTS[0], temperature=0, max_tokens=40))
    assert last == asyncio.run(answer(engine, TEXTS[2], temperature=0, max_tokens=40))
    alone = vectors(engine, TEXTS)
    torch.testing.assert_close(torch.tensor(embedded.vectors), alone.repeat(8, 1), rtol=0, atol=1e-4)
    for prompt, decision in zip(prompts, decisions, strict=True):
        assert decision.logprobs == pytest.approx(asyncio.run(engine.decide(prompt, LABELS)).logprobs, abs=1e-4)


def test_an_adapter_changes_what_is_read(make_engine: MakeEngine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = save_folder(tokenizer, tmp_path / "base")
    engine = make_engine(load_model(base, dtype=torch.float32), folder=base)
    plain, prompt = vectors(engine, TEXTS), tokenizer.encode(TEXTS[0])
    decided = asyncio.run(engine.decide(prompt, LABELS))
    engine.load_adapter("a", save_adapter_folder(base, tmp_path / "a", seed=1))
    assert (vectors(engine, TEXTS, adapter="a") - plain).abs().max() > 0.01
    assert asyncio.run(engine.decide(prompt, LABELS, adapter="a")).logprobs != decided.logprobs
    assert torch.equal(vectors(engine, TEXTS), plain)
    for ask in (engine.embed(TEXTS, adapter="b"), engine.decide(prompt, LABELS, adapter="b")):
        with pytest.raises(UnknownAdapterError):
            asyncio.run(ask)  # type: ignore[arg-type]


def test_what_cannot_be_read_is_refused_and_ends_the_whole_request(
    make_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    engine = make_engine()
    assert isinstance(engine, Reader)
    prompt = tokenizer.encode(TEXTS[0])
    full = [5] * engine.context_length
    for ask, error in (
        (engine.embed(["fine", []]), PromptError),
        (engine.embed([[10_000]]), PromptError),
        (engine.embed(["fine", [*full, 5]]), ContextLengthError),
        (engine.embed(["a" * 8_000_000]), ContextLengthError),
        (engine.embed(["a"], dimensions=49), PromptError),
        (engine.decide([], ["a"]), PromptError),
        (engine.decide(prompt, []), PromptError),
        (engine.decide(prompt, ["a", ""]), PromptError),
        (engine.decide(prompt, ["a", "b", "a"]), PromptError),
        (engine.decide(full, ["a long label"]), ContextLengthError),
    ):
        with pytest.raises(error):
            asyncio.run(ask)  # type: ignore[arg-type]
    assert len(asyncio.run(engine.embed([full])).vectors) == 1
    assert asyncio.run(engine.embed([])).vectors == []


def test_cancelling_a_request_takes_all_its_texts_away(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def run() -> None:
        task = asyncio.create_task(engine.embed([[5] * 600] * 200))
        await asyncio.sleep(0.05)
        assert 0 < engine._unfinished <= 8  # not all 200 at once, so that others find places
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine._unfinished == 0
        await answer(engine, "a", max_tokens=1)

    asyncio.run(run())


def test_a_failed_step_fails_the_reading_and_not_the_engine(
    make_engine: MakeEngine, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        with pytest.raises(EngineFailedError):
            asyncio.run(engine.embed(TEXTS))
    assert len(asyncio.run(engine.embed(TEXTS)).vectors) == len(TEXTS)
    assert len(engine.encode_chat(user("a"))) == engine.count_prompt_tokens(user("a"))
