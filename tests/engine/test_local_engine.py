"""The engine's promises: the right tokens, alone or in company, and an end whatever happens."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.core.errors import ModelError
from gale.core.settings import settings
from gale.engine.local import LocalEngine
from gale.engine.options import EngineOptions
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    EngineOverloadedError,
    SamplingError,
    SamplingParams,
    TextDelta,
    TokenScore,
)
from gale.engine.sequence import Sequence
from gale.model.attention import PackedAttention
from gale.model.checkpoint import save_model
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer, user
from tests.tiny_model import MIXTURE, make_model, save_folder

MakeEngine = Callable[..., LocalEngine]
SHORT, LONG = "Where does the river go?", "The wind came over the hill. 门关上了。 " * 30


def slow_greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding as simply as it can be said: the trainer's attention over the whole text, for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)]))
            ids.append(int(model.logits(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", [{}, MIXTURE], ids=["dense", "experts"])
@pytest.mark.parametrize("text", [SHORT, LONG], ids=["one chunk", "several chunks"])
def test_greedy_tokens_are_those_of_the_whole_forward_pass(
    make_engine: MakeEngine, tokenizer: Tokenizer, text: str, kind: dict[str, Any]
) -> None:
    model = make_model(tokenizer, **kind)
    prompt = ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt(user(text))
    expected = tokenizer.stream()
    words = "".join(expected.push(token) for token in slow_greedy(model, prompt, 24))
    given, finished = asyncio.run(answer(make_engine(model), text, temperature=0, max_tokens=24))
    assert given == words
    assert finished.reason == "length"
    assert finished.usage.prompt_tokens == len(prompt)
    assert finished.usage.completion_tokens == 24


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, make_engine: MakeEngine, tokenizer: Tokenizer, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    shape: dict[str, Any] = {"family": family, "qk_norm": family == "qwen3"}
    if family == "mistral":
        shape["sliding_window"] = 40
    model = make_model(tokenizer, **shape)
    save_model(model, tmp_path, dtype=torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt(user(LONG[:300]))
    wanted = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    stream = tokenizer.stream()
    expected = "".join(stream.push(int(token)) for token in wanted[0, len(prompt) :])
    given, _ = asyncio.run(answer(make_engine(model), LONG[:300], temperature=0, max_tokens=32))
    assert given == expected


def test_an_answer_is_the_same_alone_and_in_company(make_engine: MakeEngine) -> None:
    engine = make_engine()
    texts = [SHORT, LONG, "河流去哪里？", "a", LONG[:200], "The sea?"]

    async def together() -> list[tuple[str, Any]]:
        return list(await asyncio.gather(*(answer(engine, text, temperature=0, max_tokens=20) for text in texts)))

    async def one_by_one() -> list[tuple[str, Any]]:
        return [await answer(engine, text, temperature=0, max_tokens=20) for text in texts]

    assert asyncio.run(together()) == asyncio.run(one_by_one())


def test_a_seed_makes_an_answer_reproducible_in_any_company(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def seeded(seed: int) -> str:
        return (await answer(engine, SHORT, temperature=1.0, seed=seed, max_tokens=20))[0]

    async def run() -> tuple[str, list[str]]:
        alone = await seeded(5)
        return alone, list(await asyncio.gather(seeded(5), seeded(6), seeded(5)))

    alone, together = asyncio.run(run())
    assert together[0] == together[2] == alone
    assert together[1] != alone


def test_stop_strings_end_the_answer_and_never_show(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole, _ = asyncio.run(answer(engine, SHORT, temperature=0, max_tokens=40))
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    given, finished = asyncio.run(answer(engine, SHORT, temperature=0, max_tokens=40, stop=("never there", stop)))
    assert given == whole[: whole.index(stop)]
    assert finished.reason == "stop"
    assert finished.usage.completion_tokens < 40


def test_end_tokens_end_the_answer(make_engine: MakeEngine, model: Decoder, tokenizer: Tokenizer) -> None:
    prompt = ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt(user(SHORT))
    tokens = slow_greedy(model, prompt, 10)
    end = tokens[6]
    _, finished = asyncio.run(answer(make_engine(end_tokens=frozenset([end])), SHORT, temperature=0))
    assert finished.reason == "stop"
    assert finished.usage.completion_tokens == tokens.index(end) + 1


def test_stop_tokens_of_a_request_end_its_answer_without_being_shown(
    make_engine: MakeEngine, model: Decoder, tokenizer: Tokenizer
) -> None:
    tokens = slow_greedy(model, ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt(user(SHORT)), 10)
    engine = make_engine()
    whole, _ = asyncio.run(answer(engine, SHORT, temperature=0, max_tokens=10))
    text, finished = asyncio.run(answer(engine, SHORT, temperature=0, stop_token_ids=(tokens[6], 10**12)))
    assert (finished.reason, finished.usage.completion_tokens) == ("stop", tokens.index(tokens[6]) + 1)
    assert whole.startswith(text)
    assert text != whole


def test_penalties_work_on_what_was_said(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def tokens(**sampling: Any) -> list[int]:
        async def collect() -> list[int]:
            events = engine.complete([5, 6, 7], SamplingParams(temperature=0, max_tokens=40, logprobs=0, **sampling))
            return [event.score.token async for event in events if isinstance(event, TextDelta) and event.score]

        return asyncio.run(collect())

    repeated = tokens(logit_bias=((9, 100.0),))
    assert repeated == [9] * 40
    assert len(set(tokens(presence_penalty=2.0, logit_bias=((9, 100.0), (11, 99.0))))) == 2
    assert len(set(tokens(frequency_penalty=2.0, logit_bias=tuple((token, 100.0) for token in range(60))))) >= 30


def test_a_bias_for_a_token_that_does_not_exist_is_refused(make_engine: MakeEngine) -> None:
    for token in (-1, 10**6):
        with pytest.raises(SamplingError):
            asyncio.run(answer(make_engine(), SHORT, logit_bias=((token, 1.0),)))


def test_without_max_tokens_the_context_is_the_limit(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    engine = make_engine(make_model(tokenizer, context_length=64))
    _, finished = asyncio.run(answer(engine, SHORT, temperature=0))
    assert finished.reason == "length"
    assert finished.usage.prompt_tokens + finished.usage.completion_tokens == 64


def test_a_prompt_may_fill_all_but_one_token_of_the_context(make_engine: MakeEngine, tokenizer: Tokenizer) -> None:
    tokens = len(ChatTemplate(tokenizer.chat_template or "", tokenizer).prompt(user(SHORT)))
    _, finished = asyncio.run(answer(make_engine(make_model(tokenizer, context_length=tokens + 1)), SHORT))
    assert finished.usage.completion_tokens == 1
    with pytest.raises(ContextLengthError, match=f"maximum context length is {tokens} tokens"):
        asyncio.run(answer(make_engine(make_model(tokenizer, context_length=tokens)), SHORT))


def test_megabytes_are_refused_without_being_encoded(
    make_engine: MakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("encoded"))
    calls = [{"function": {"name": "f", "arguments": "a" * 8_000_000}}]
    for message in (
        Message(role="user", content="a" * 8_000_000),
        Message(role="assistant", content="", tool_calls=calls),
    ):
        with pytest.raises(ContextLengthError, match="at least"):
            make_engine().count_prompt_tokens([message])


def test_closing_the_iterator_stops_the_generation_within_a_step(
    make_engine: MakeEngine, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    steps = 0
    forward = model.forward

    def counted(ids_N: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return forward(ids_N, positions_N, attend)

    monkeypatch.setattr(model, "forward", counted)

    async def run() -> int:
        events = engine.chat(user(SHORT), SamplingParams(max_tokens=600))
        await anext(events)
        await events.aclose()
        at_close = steps
        # Another request is answered meanwhile: the engine goes on, without the closed one.
        await answer(engine, "a", temperature=0, max_tokens=30)
        return steps - at_close

    assert asyncio.run(run()) <= 30 + 1


def test_the_event_loop_goes_on_while_the_model_computes(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def run() -> bool:
        task = asyncio.create_task(answer(engine, LONG, temperature=0, max_tokens=60))
        ticks = 0
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        return ticks > 60

    assert asyncio.run(run())


def test_a_failed_step_fails_its_requests_and_not_the_engine(
    make_engine: MakeEngine, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        with pytest.raises(EngineFailedError):
            asyncio.run(answer(engine, SHORT))
    _, finished = asyncio.run(answer(engine, SHORT, max_tokens=3))
    assert finished.usage.completion_tokens == 3


def test_one_broken_answer_does_not_end_the_others(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    accept = Sequence.accept

    def broken(self: Sequence, token: int, score: TokenScore | None = None) -> None:
        if self.params.seed == 13:
            raise RuntimeError("bad luck")
        accept(self, token, score)

    monkeypatch.setattr(Sequence, "accept", broken)

    async def run() -> list[Any]:
        answers = (answer(engine, SHORT, seed=seed, max_tokens=8) for seed in (1, 13, 2))
        return list(await asyncio.gather(*answers, return_exceptions=True))

    first, second, third = asyncio.run(run())
    assert isinstance(second, EngineFailedError)
    assert first[1].usage.completion_tokens == third[1].usage.completion_tokens == 8


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_said(
    make_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    engine = make_engine(options=EngineOptions(max_cached_tokens=128))
    assert engine.context_length == 128
    with pytest.raises(ContextLengthError, match="128 tokens"):
        asyncio.run(answer(engine, LONG))
    _, finished = asyncio.run(answer(engine, SHORT, temperature=0, max_tokens=10**9))
    assert finished.reason == "length"
    assert finished.usage.prompt_tokens + finished.usage.completion_tokens == 128
    with pytest.raises(ModelError, match="memory"):
        make_engine(options=EngineOptions(max_cached_tokens=20))


def test_a_full_queue_refuses_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(options=EngineOptions(max_unfinished=1))

    async def run() -> None:
        first = engine.chat(user(SHORT), SamplingParams(max_tokens=200))
        await anext(first)
        with pytest.raises(EngineOverloadedError):
            await anext(engine.chat(user(SHORT), SamplingParams()))
        await first.aclose()
        await answer(engine, SHORT, max_tokens=1)

    asyncio.run(run())


def test_close_ends_open_requests(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def run() -> None:
        events = engine.chat(user(SHORT), SamplingParams(max_tokens=600))
        await anext(events)
        await engine.close()
        with pytest.raises(EngineFailedError):
            async for event in events:
                assert isinstance(event, TextDelta)
        with pytest.raises(EngineFailedError):
            await answer(engine, SHORT)

    asyncio.run(run())


def test_answering_and_scoring_load_no_compiler(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It takes a second at start or at the first answer, and 70 MB for ever."""
    script = """
import asyncio, sys
from pathlib import Path
from gale.engine.local import LocalEngine
from gale.engine.request import SamplingParams

async def main(engine):
    assert [event async for event in engine.complete([5, 6], SamplingParams(max_tokens=2))]
    engine.log_likelihood([5, 6, 7])

asyncio.run(main(LocalEngine.load(Path(sys.argv[1]), weights="int8")))
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()
"""
    folder = save_folder(tokenizer, tmp_path / "tiny", **MIXTURE)
    environment = {**os.environ, "GALE_HOME": str(settings().home)}
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=environment)
