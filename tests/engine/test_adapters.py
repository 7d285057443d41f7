"""Many adapters over one base: each request gets its own, as if it were alone and merged, and no other's."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.core.errors import ModelError
from gale.engine.local import MOST_ADAPTER_RANK, LocalEngine
from gale.engine.request import Finished, PromptScores, SamplingParams, TextDelta, UnknownAdapterError
from gale.model.adapter_folder import merge_adapter
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model
from gale.model.quantised import Weights, quantise
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer, user
from tests.tiny_model import MIXTURE, save_adapter_folder, save_folder

Open = Callable[..., LocalEngine]
TEXT = "Where does the river go? It goes to the sea."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def base(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save_folder(tokenizer, tmp_path / "base")


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> dict[str, Path]:
    """Three adapters of different ranks, scales and layers."""
    shapes: dict[str, dict[str, Any]] = {
        "all": {"rank": 4, "alpha": 8},
        "few": {"rank": 3, "alpha": 7, "targets": ("q_proj", "layers.1.mlp.down_proj")},
        "wide": {"rank": 16, "alpha": 8, "targets": ("layers.1.*",)},
    }
    return {
        name: save_adapter_folder(base, tmp_path / name, seed=seed, **shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture
def open_engine(tokenizer: Tokenizer) -> Iterator[Open]:
    engines: list[LocalEngine] = []

    def make(
        base: Path,
        adapters: dict[str, Path] | None = None,
        dtype: torch.dtype = torch.float32,
        weights: Weights = "bf16",
    ) -> LocalEngine:
        model = load_model(base, dtype=dtype)
        quantise(model, weights)
        engines.append(LocalEngine(model, tokenizer, model_id="tiny", folder=base))
        for name, folder in (adapters or {}).items():
            engines[-1].load_adapter(name, folder)
        return engines[-1]

    yield make
    for engine in engines:
        asyncio.run(engine.close())


async def scores(
    engine: LocalEngine, ids: list[int], adapter: str | None, count: int = 12
) -> tuple[list[int], list[float]]:
    """The tokens of a greedy answer, and the log-probabilities of all tokens but the first, the prompt's among them."""
    params = SamplingParams(max_tokens=count, temperature=0, logprobs=0, prompt_logprobs=True, adapter=adapter)
    tokens: list[int] = []
    logprobs: list[float] = []
    async for event in engine.complete(ids, params):
        if isinstance(event, PromptScores):
            logprobs += [score.logprob for score in event.scores if score.logprob is not None]
        elif isinstance(event, TextDelta) and event.score is not None and event.score.logprob is not None:
            tokens.append(event.score.token)
            logprobs.append(event.score.logprob)
    return tokens, logprobs


async def mixed(engine: LocalEngine, ids: list[int], names: list[str | None]) -> list[tuple[list[int], list[float]]]:
    """Prompts of different lengths at once; those of one adapter do not stand together."""
    return list(await asyncio.gather(*(scores(engine, ids[place:], name) for place, name in enumerate(names))))


def teacher(model: Decoder, ids: list[int]) -> list[float]:
    with torch.inference_mode():
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedAttention([len(ids)]))
        return chosen(model.logits(hidden), ids)


def chosen(logits: Tensor, ids: list[int]) -> list[float]:
    table = torch.log_softmax(logits.float(), -1)
    found: list[float] = table[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
    return found


def hooks(engine: LocalEngine) -> int:
    return sum(len(module._forward_hooks) for module in engine._model.modules())


@pytest.mark.parametrize("family", [{}, {"family": "qwen2", "qkv_bias": True, "qk_norm": False}, MIXTURE])
def test_in_a_mixed_batch_each_request_is_answered_as_alone_and_as_merged(
    tmp_path: Path, tokenizer: Tokenizer, open_engine: Open, family: dict[str, Any]
) -> None:
    base = save_folder(tokenizer, tmp_path / "base", **family)
    experts = {"targets": ATTENTION} if family is MIXTURE else {}
    adapters = {
        name: save_adapter_folder(base, tmp_path / name, seed=seed, rank=rank, alpha=6, **experts)
        for seed, (name, rank) in enumerate({"a": 4, "b": 9}.items())
    }
    engine, ids = open_engine(base, adapters), tokenizer.encode(TEXT)
    names: list[str | None] = ["a", None, "b", "a", None, "b", "b"]
    together = asyncio.run(mixed(engine, ids, names))
    merged = {None: load_model(base, dtype=torch.float32)}
    for name, folder in adapters.items():
        merge_adapter(folder, base, tmp_path / f"merged-{name}", dtype=torch.float32)
        merged[name] = load_model(tmp_path / f"merged-{name}", dtype=torch.float32)
    for place, name in enumerate(names):
        tokens, logprobs = together[place]
        alone = asyncio.run(scores(engine, ids[place:], name))
        assert alone[0] == tokens
        assert alone[1] == pytest.approx(logprobs, abs=1e-4)
        assert teacher(merged[name], [*ids[place:], *tokens]) == pytest.approx(logprobs, abs=1e-4)
    assert len({tuple(logprobs[-20:]) for _, logprobs in together}) == len(names)


def test_peft_computes_the_same(base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, open_engine: Open) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    engine, ids = open_engine(base, adapters), tokenizer.encode(TEXT)
    names: list[str | None] = [*adapters, *adapters]
    together = asyncio.run(mixed(engine, ids, names))
    for place, name in enumerate(names):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        theirs = peft.PeftModel.from_pretrained(theirs, adapters[name or ""]).eval()
        whole = [*ids[place:], *together[place][0]]
        with torch.no_grad():
            expected = chosen(theirs(torch.tensor([whole])).logits[0], whole)
        assert expected == pytest.approx(together[place][1], abs=1e-4)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_in_bf16_an_answer_has_the_same_bits_alone_and_in_company(
    base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, open_engine: Open, weights: Weights
) -> None:
    engine, ids = open_engine(base, adapters, torch.bfloat16, weights), tokenizer.encode(TEXT)
    names: list[str | None] = ["all", "few", None, "all", "wide", None, "few", "wide"]
    together = asyncio.run(mixed(engine, ids, names))
    for place, name in enumerate(names):
        assert asyncio.run(scores(engine, ids[place:], name)) == together[place]


def test_the_base_computes_the_very_same_with_adapters_beside_it_and_without(
    base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, open_engine: Open
) -> None:
    bare, engine, ids = open_engine(base), open_engine(base, adapters), tokenizer.encode(TEXT)
    expected = asyncio.run(scores(bare, ids, None))
    assert asyncio.run(scores(engine, ids, None)) == expected
    assert hooks(engine) == 0  # nobody has asked for an adapter yet
    asyncio.run(mixed(engine, ids, ["all", "few"]))
    assert hooks(engine) > 0
    assert asyncio.run(scores(engine, ids, None)) == expected
    for name in adapters:
        engine.unload_adapter(name)
    assert asyncio.run(scores(engine, ids, None)) == expected
    assert hooks(engine) == hooks(bare) == 0


def test_an_adapter_unloaded_in_use_answers_to_the_end_and_is_then_gone(
    base: Path, adapters: dict[str, Path], open_engine: Open
) -> None:
    engine = open_engine(base, adapters)
    whole, _ = asyncio.run(answer(engine, TEXT, temperature=0, max_tokens=150, adapter="all"))
    memory = weakref.ref(engine._adapters.get("all").layers["layers.0.self_attn.q_proj"][0])  # type: ignore[union-attr]

    async def run() -> str:
        events = engine.chat(user(TEXT), SamplingParams(temperature=0, max_tokens=150, adapter="all"))
        parts = [event.text async for event in _first(events) if isinstance(event, TextDelta)]
        engine.unload_adapter("all")
        assert engine.adapters == ("few", "wide")
        with pytest.raises(UnknownAdapterError):
            await anext(engine.chat(user(TEXT), SamplingParams(adapter="all")))
        assert memory() is not None
        engine.load_adapter("all", adapters["wide"])  # another under its name changes nothing either
        async for event in events:
            parts += [event.text] if isinstance(event, TextDelta) else []
        return "".join(parts)

    async def _first(events: Any) -> Any:
        yield await anext(events)

    assert asyncio.run(run()) == whole
    asyncio.run(answer(engine, TEXT, temperature=0, max_tokens=2))
    gc.collect()
    assert memory() is None
    other, _ = asyncio.run(answer(engine, TEXT, temperature=0, max_tokens=150, adapter="all"))
    assert other == asyncio.run(answer(engine, TEXT, temperature=0, max_tokens=150, adapter="wide"))[0] != whole
    with pytest.raises(UnknownAdapterError, match="no adapter `gone`"):
        engine.unload_adapter("gone")


def test_loading_beside_running_requests_does_not_touch_them(
    base: Path, adapters: dict[str, Path], open_engine: Open
) -> None:
    engine = open_engine(base, {"all": adapters["all"]})
    names = [None, "all", None]

    async def run(load: bool) -> list[tuple[str, Finished]]:
        running = [asyncio.create_task(answer(engine, TEXT, temperature=0, max_tokens=80, adapter=n)) for n in names]
        if load:
            await asyncio.to_thread(engine.load_adapter, "few", adapters["few"])
            await answer(engine, TEXT, temperature=0, max_tokens=5, adapter="few")
        return list(await asyncio.gather(*running))

    assert asyncio.run(run(load=True)) == asyncio.run(run(load=False))


def test_what_was_read_under_one_adapter_is_copied_for_no_other(
    base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, open_engine: Open
) -> None:
    """Long prompts, of which the prefix cache keeps the keys and values; vectors never copy, whoever read the text."""
    engine, ids = open_engine(base, adapters), tokenizer.encode(TEXT) * 20
    names: list[str | None] = [None, "all", "few", None, "all"]

    async def ask(engine: LocalEngine, name: str | None) -> tuple[str, list[float]]:
        text, finished = await answer(engine, TEXT * 20, temperature=0, max_tokens=12, adapter=name)
        assert finished.usage.completion_tokens == 12
        return text, (await engine.embed([ids], adapter=name)).vectors[0]

    for name in names:
        fresh = open_engine(base, adapters)
        expected, vector = asyncio.run(ask(fresh, name))
        given, other = asyncio.run(ask(engine, name))
        assert given == expected
        assert other == pytest.approx(vector, abs=1e-4)
    engine.load_adapter("all", adapters["wide"])
    expected, _ = asyncio.run(ask(engine, "wide"))
    assert asyncio.run(ask(engine, "all"))[0] == expected


def test_every_loading_has_a_namespace_of_its_own(base: Path, adapters: dict[str, Path], open_engine: Open) -> None:
    engine = open_engine(base, adapters)
    first = engine._adapters.get("all")
    engine.load_adapter("all", adapters["all"])
    second, third = engine._adapters.get("all"), engine._adapters.get("few")
    assert first and second and third
    assert len({first.namespace, second.namespace, third.namespace, 0}) == 4


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_over_rounded_weights_the_adapter_itself_is_not_rounded(
    base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, open_engine: Open, weights: Weights
) -> None:
    engine, ids = open_engine(base, adapters, weights=weights), tokenizer.encode(TEXT)
    names: list[str | None] = ["all", None, "few", "all"]
    together = asyncio.run(mixed(engine, ids, names))
    model = load_model(base, dtype=torch.float32)
    quantise(model, weights)
    bare = asyncio.run(scores(open_engine(base, weights=weights), ids[1:], None))
    assert together[1][0] == bare[0]
    assert together[1][1] == pytest.approx(bare[1], abs=1e-4)
    for place, name in enumerate(names):
        adapter = engine._adapters.get(name)
        assert asyncio.run(scores(engine, ids[place:], name))[1] == pytest.approx(together[place][1], abs=1e-4)
        whole = [*ids[place:], *together[place][0]]
        # The same sum, said otherwise: each layer's output and the adapter's product beside it.
        beside = {} if adapter is None else adapter.layers
        added = [
            model.get_submodule(layer).register_forward_hook(lambda _, x, out, a=a, b=b: out + x[0] @ a.T @ b.T)
            for layer, (a, b) in beside.items()
        ]
        assert teacher(model, whole) == pytest.approx(together[place][1], abs=1e-4)
        for hook in added:
            hook.remove()


def test_an_adapter_speaks_by_its_own_template_and_ends_by_its_own_tokens(
    base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, open_engine: Open
) -> None:
    tokenizer.save(adapters["few"])
    template = "{% for message in messages %}{{ message.content }}{% endfor %} and so it is answered:"
    (adapters["few"] / "chat_template.jinja").write_text(template)
    settings = json.loads((adapters["few"] / "tokenizer_config.json").read_text())
    (adapters["few"] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    engine = open_engine(base, adapters)
    _, own = asyncio.run(answer(engine, TEXT, temperature=0, max_tokens=3, adapter="few"))
    assert own.usage.prompt_tokens == len(tokenizer.encode(f"{TEXT} and so it is answered:"))
    _, other = asyncio.run(answer(engine, TEXT, temperature=0, max_tokens=3, adapter="all"))
    assert other.usage.prompt_tokens == engine.count_prompt_tokens(user(TEXT)) != own.usage.prompt_tokens
    tokens, _ = asyncio.run(scores(engine, tokenizer.encode(TEXT), "few"))
    (adapters["few"] / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[5]}))
    engine.load_adapter("few", adapters["few"])
    cut, _ = asyncio.run(scores(engine, tokenizer.encode(TEXT), "few"))
    assert cut == tokens[: tokens.index(tokens[5]) + 1]


def test_an_adapter_that_does_not_belong_here_is_refused_and_says_why(
    base: Path, adapters: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, open_engine: Open
) -> None:
    engine = open_engine(base)
    ids = tokenizer.encode(TEXT)
    before = asyncio.run(scores(engine, ids, None))
    other = save_folder(tokenizer, tmp_path / "other", hidden_size=64)
    alien = save_adapter_folder(other, tmp_path / "alien", seed=1)
    deep = save_adapter_folder(save_folder(tokenizer, tmp_path / "deep-base", layers=3), tmp_path / "deep", seed=1)
    high = save_adapter_folder(base, tmp_path / "high", seed=1, rank=MOST_ADAPTER_RANK + 1, targets=("q_proj",))
    for folder, reason in ((alien, "made for another base than"), (high, "rank 257; at most 256")):
        with pytest.raises(ModelError, match=reason):
            engine.load_adapter("x", folder)
    for folder, reason in ((alien, r"has shape \[64, 4\], where the model needs \[48, 4\]"), (deep, r"layers\.2\.")):
        (folder / "base.json").unlink()  # as PEFT's adapters are, which do not say what they were made for
        with pytest.raises(ModelError, match=reason):
            engine.load_adapter("x", folder)
    foreign = Tokenizer.train(["entirely other words"] * 9, vocabulary_size=300, chat_template="{{ messages }}")
    foreign.save(adapters["few"])
    with pytest.raises(ModelError, match="another tokenizer"):
        engine.load_adapter("x", adapters["few"])
    config = json.loads((adapters["all"] / "adapter_config.json").read_text())
    (adapters["all"] / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ModelError, match="use_dora"):
        engine.load_adapter("x", adapters["all"])
    shutil.rmtree(adapters["wide"])
    with pytest.raises(ModelError, match="holds no adapter"):
        engine.load_adapter("x", adapters["wide"])
    for name in ("", "tiny"):
        with pytest.raises(ModelError, match="cannot be called"):
            engine.load_adapter(name, tmp_path)
    assert engine.adapters == ()
    assert asyncio.run(scores(engine, ids, None)) == before
