"""``gale train rl``: answers get better, by the numbers of the papers, and a resumed run ends in the same bits."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from bench.postcards import CONTEXT, NAMES, TOPICS, asked, write_rows, write_world
from gale.core.device import choose_compute
from gale.core.errors import CheckpointError, DataError, GaleError, ModelError, RecipeError
from gale.core.recipe import load_recipe
from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.data.verifiers import verify
from gale.engine.request import SamplingParams
from gale.engine.rollouts import Rollout, end_tokens_of, generate
from gale.model.adapter_folder import merge_adapter
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model
from gale.model.config import ModelConfig
from gale.model.reward_model import RewardModel, load_reward_model, save_reward_model
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate
from gale.text.tokenizer import Tokenizer
from gale.train.best_of_n import BestOfNRecipe, best_of_n
from gale.train.grow import grow_only
from gale.train.pretrain import pretrain
from gale.train.prompts import prompts_of_split, read_prompts
from gale.train.recipe import GrowRecipe, PretrainRecipe
from gale.train.rewards import ModelJudge
from gale.train.rl import rl
from gale.train.rl_recipe import RlRecipe
from tests.train.runs import metrics

WITH_LOVE = {"verifier": "contains"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy that writes cards, one in six of which closes with love, and prompts that expect that of all."""
    folder = tmp_path_factory.mktemp("world")
    paths = write_world(folder, cards=2000, prompts=48, seed=0)
    sources = [
        {"path": paths["cards"], "format": "chat", "licence": "Apache-2.0", "origin": "made up"},
        {"path": paths["held_out_cards"], "format": "chat", "licence": "x", "origin": "x", "split": "cards"},
    ]
    data = DataRecipe.model_validate({"tokenizer": paths["tokenizer"], "sources": tuple(sources)})
    prepare(data, folder / "data")
    base = PretrainRecipe.model_validate(
        {
            "data": folder / "data",
            "steps": 100,
            "batch_rows": 16,
            "micro_rows": 16,
            "row_tokens": CONTEXT,
            "precision": "fp32",
            "export": "fp32",
            "evaluate_every": 100,
            "model": {
                "hidden_size": 48,
                "intermediate_size": 96,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 16,
                "context_length": CONTEXT,
            },
            "optimiser": {"algorithm": "muon", "learning_rate": 0.01, "warmup_steps": 5},
        }
    )
    pretrain(base, folder / "base")
    paths |= {"data": folder / "data", "base": folder / "base" / "model", "folder": folder}
    tasks = [(name, topic) for name in NAMES for topic in TOPICS]
    random.Random(0).shuffle(tasks)
    for name, several in (("asking", tasks[16:]), ("new", tasks[:16])):
        rows = [{"messages": asked(task), "expected": "love"} for task in several]
        paths[name] = write_rows(folder / f"{name}.jsonl", rows)
    return paths


def rl_recipe(world: dict[str, Path], algorithm: str = "grpo", **changes: Any) -> RlRecipe:
    fields: dict[str, Any] = {
        "data": world["asking"],
        "held_out": world["new"],
        "base": world["base"],
        "algorithm": algorithm,
        "reward": WITH_LOVE,
        "steps": 6,
        "batch_rows": 16,
        "micro_rows": 8,
        "row_tokens": CONTEXT,
        "answer_tokens": 24,
        "answers_per_prompt": 4,
        "precision": "fp32",
        "export": "fp32",
        "evaluate_every": 3,
        "evaluate_temperature": 1.0,
        "checkpoint_every": 2,
        "optimiser": {"learning_rate": 0.002, "warmup_steps": 0},
    }
    return RlRecipe.model_validate(fields | changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_model(out / "model", dtype=torch.float32).state_dict()


def passes(folder: Path, path: Path, *, samples: int) -> npt.NDArray[np.float64]:
    """Share of a model's answers to each prompt that the verifier lets pass."""
    model, tokenizer = load_model(folder, dtype=torch.float32), Tokenizer.load(folder)
    prompts = read_prompts(path, tokenizer, most_tokens=CONTEXT, seed=0).prompts
    asked = [prompt for prompt in prompts for _ in range(samples)]
    sampling = [SamplingParams(max_tokens=24, seed=seed) for seed in range(len(asked))]
    answers = generate(model, [prompt.ids for prompt in asked], sampling, end_tokens=end_tokens_of(tokenizer))
    right = [verify("contains", tokenizer.decode(answer.tokens), "love") for answer in answers]
    return np.array(right).reshape(-1, samples).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_answers_to_new_prompts_get_better(world: dict[str, Path], tmp_path: Path, algorithm: str) -> None:
    settings: dict[str, Any] = {"steps": 20, "batch_rows": 64, "micro_rows": 64, "answers_per_prompt": 8}
    if algorithm == "ppo":
        settings |= {"steps": 40, "updates_per_rollout": 2, "epochs_per_rollout": 2, "answers_per_prompt": 1}
    rl(rl_recipe(world, algorithm, **settings), tmp_path / "run")
    before = passes(world["base"], world["new"], samples=16)
    after = passes(tmp_path / "run" / "model", world["new"], samples=16)
    gains = after - before
    drawn = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
    low = np.quantile(gains[drawn].mean(1), 0.025)
    assert gains.mean() >= 0.15
    assert low > 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"algorithm": "ppo", "updates_per_rollout": 2, "epochs_per_rollout": 2}],
    ids=["grpo", "ppo, two epochs"],
)
def test_a_resumed_run_ends_in_the_same_bits(world: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = rl_recipe(world, **changes, keep_checkpoints=9)
    rl(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000002", tmp_path / "cut/checkpoints/step-00000002")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    rl(settings, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name in ("model/model.safetensors", "checkpoints/step-00000006/state.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_sixteen_answers_at_once_are_sixteen_one_by_one(world: dict[str, Path], tmp_path: Path, algorithm: str) -> None:
    for name, rows in (("whole", 16), ("pieces", 1)):
        rl(rl_recipe(world, algorithm, steps=1, micro_rows=rows), tmp_path / name)
    [one], [other] = metrics(tmp_path / "whole"), metrics(tmp_path / "pieces")
    assert one["gradient_norm"] > 0
    for key in ("loss", "gradient_norm", "kl", "reward", "tokens"):
        assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "pieces")[name], rtol=1e-3, atol=2e-4)


def test_before_anything_is_learnt_policy_reference_and_engine_agree(world: dict[str, Path], tmp_path: Path) -> None:
    rl(rl_recipe(world, steps=1, gold={"verifier": "f1"}), tmp_path / "run")
    [row] = metrics(tmp_path / "run")
    assert row["kl"] == 0
    assert row["engine_gap"] < 1e-5
    assert row["clip_fraction"] == 0
    assert 0 < row["finished"] <= 1
    assert 0 < row["answer_tokens"] <= 24
    assert {"new_reward", "new_gold"} == row["held_out"].keys()
    assert 0 < row["gold"] < 1


def test_groups_without_a_difference_are_counted_and_change_nothing(world: dict[str, Path], tmp_path: Path) -> None:
    everything_passes = {"verifier": "regex", "options": {"pattern": "dear|x"}}
    rl(rl_recipe(world, steps=2, reward=everything_passes), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["dropped_groups"] for row in rows] == [1, 1]
    assert [row["gradient_norm"] for row in rows] == [0, 0]
    base = load_model(world["base"], dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(tmp_path / "run").items())


@pytest.mark.parametrize(("algorithm", "place"), [("grpo", "loss"), ("grpo", "reward"), ("ppo", "reward")])
def test_the_price_of_distance_holds_the_policy_near(
    world: dict[str, Path], tmp_path: Path, algorithm: str, place: str
) -> None:
    far = []
    for price in (0.0, 2.0):
        out = tmp_path / str(price)
        settings = {"steps": 6, "evaluate_every": 99, "checkpoint_every": 99, "answer_tokens": 8}
        rl(rl_recipe(world, algorithm, kl_in=place, kl_coefficient=price, **settings), out)
        far.append(metrics(out)[-1]["kl"])
    assert far[1] < 0.6 * far[0]


def test_an_answer_that_was_cut_is_paid_as_asked(world: dict[str, Path], tmp_path: Path) -> None:
    rl(rl_recipe(world, steps=1, answer_tokens=1, unfinished_reward=-3.0), tmp_path / "run")
    [row] = metrics(tmp_path / "run")
    assert (row["reward"], row["reward_std"], row["finished"]) == (-3, 0, 0)


def reward_folder(world: dict[str, Path], folder: Path, *, context: int = CONTEXT, tokens: int | None = None) -> Path:
    """A reward model with random opinions."""
    tokenizer = Tokenizer.load(world["base"])
    size = tokens or tokenizer.vocabulary_size
    trunk = Decoder(ModelConfig("qwen3", size, 16, 16, 1, 2, 1, 8, context, tied_embeddings=True))
    trunk.initialise(3)
    model = RewardModel(trunk)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(4))
    save_reward_model(model, folder, dtype=torch.float32)
    tokenizer.save(folder)
    return folder


def test_a_reward_model_judges_by_its_value_at_the_last_token(world: dict[str, Path], tmp_path: Path) -> None:
    folder = reward_folder(world, tmp_path / "reward")
    tokenizer, model = Tokenizer.load(folder), load_reward_model(folder, dtype=torch.float32)
    judge = ModelJudge.load(folder, tokenizer, choose_compute("fp32"), row_tokens=CONTEXT, rows=2)
    answers = [
        Rollout([1, 2, 3], list(range(4, 9)), [], "stop"),
        Rollout([7], [8], [], "length"),
        Rollout([5, 6], [1, 1], [], "stop"),
    ]
    for answer, found in zip(answers, judge([], answers), strict=True):
        ids = torch.tensor([*answer.prompt, *answer.tokens])
        values = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))
        assert found == pytest.approx(float(values.detach()[-1]), abs=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_reward_model_is_optimised_while_a_program_watches(
    world: dict[str, Path], tmp_path: Path, algorithm: str
) -> None:
    folder = reward_folder(world, tmp_path / "reward")
    changes: dict[str, Any] = {"reward": {"model": folder}, "gold": WITH_LOVE, "steps": 8, "kl_coefficient": 0.0}
    if algorithm == "ppo":
        changes |= {"critic": folder, "answers_per_prompt": 1}
    rl(rl_recipe(world, algorithm, **changes), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert all(0 <= row["gold"] <= 1 for row in rows)
    other = reward_folder(world, tmp_path / "other")
    save_reward_model(RewardModel(load_reward_model(other, dtype=torch.float32).trunk), other)
    with pytest.raises(CheckpointError, match=r"reward\.model"):
        rl(rl_recipe(world, algorithm, **changes | {"reward": {"model": other}}), tmp_path / "run", resume=True)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_routers_of_a_mixture_are_kept_even(world: dict[str, Path], tmp_path: Path, algorithm: str) -> None:
    for name, weight in (("free", 0.0), ("even", 0.5)):
        experts = {"count": 4, "per_token": 2, "balance_loss": weight, "z_loss": 0.0}
        recipe = {"data": world["data"], "base": world["base"], "grow": {"experts": experts}, "row_tokens": CONTEXT}
        recipe |= {"steps": 1, "batch_rows": 1, "micro_rows": 1, "optimiser": {"learning_rate": 0.001}}
        grow_only(GrowRecipe.model_validate(recipe), tmp_path / name)
        changes = {"base": tmp_path / name, "answers_per_prompt": 4, "steps": 1}
        rl(rl_recipe(world, algorithm, **changes), tmp_path / f"{name}-run")
    (free,), (even,) = (metrics(tmp_path / f"{name}-run") for name in ("free", "even"))
    assert free["balance_loss"] == even["balance_loss"] >= 2
    assert free["loss"] == even["loss"]
    assert free["gradient_norm"] != even["gradient_norm"]


def test_prompts_of_prepared_conversations_end_where_the_last_answer_begins(
    world: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(world["base"])
    several = prompts_of_split(world["data"], "cards", tokenizer, most_tokens=40, seed=0)
    cards = [json.loads(line)["messages"] for line in world["held_out_cards"].read_text().splitlines()]
    template = ChatTemplate(tokenizer.chat_template or "", tokenizer)
    assert [prompt.ids for prompt in several.prompts] == [template.prompt(card[:1]) for card in cards]
    assert [prompt.expected for prompt in several.prompts] == [card[1]["content"] for card in cards]
    rl(rl_recipe(world, data=world["data"], held_out=None, reward={"verifier": "f1"}, steps=1), tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["held_out"].keys() == {"cards_reward"}


def test_what_cannot_work_is_refused_before_anything_is_computed(world: dict[str, Path], tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    no_hint = write_rows(tmp_path / "no_hint.jsonl", [{"prompt": "dear"}])
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"prompt": "dear", "expected": "x"}, {"question": "?"}])
    narrow = reward_folder(world, tmp_path / "narrow", context=16)
    swapped = reward_folder(world, tmp_path / "swapped")
    content = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    cases: list[tuple[dict[str, Any], type[GaleError], str]] = [
        ({"data": empty}, DataError, "no prompts in"),
        ({"data": tmp_path / "nowhere.jsonl"}, DataError, "no file of prompts"),
        ({"data": wrong}, DataError, r"wrong.jsonl, line 2: not a prompt: 'prompt' is missing"),
        ({"data": no_hint}, DataError, "1 prompts say nothing about what the verifier is to expect.*line 1"),
        ({"row_tokens": 26}, DataError, "too long: the shortest has .* tokens, and 2 fit"),
        ({"row_tokens": 4096}, DataError, "row_tokens is 4096"),
        ({"reward": {"verifier": "taste"}}, RecipeError, "no verifier 'taste'"),
        ({"reward": {"model": world["base"]}}, ModelError, "no reward model"),
        ({"reward": {"model": narrow}}, ModelError, "reads 16 at most"),
        ({"reward": {"model": swapped}}, ModelError, "differ in 2 tokens, the first being 'a'"),
        ({"algorithm": "ppo", "critic": swapped}, ModelError, "differ in 2 tokens"),
        ({"algorithm": "ppo", "critic": narrow}, ModelError, "critic .*narrow reads 16 at most"),
        ({"algorithm": "ppo", "critic": world["base"]}, ModelError, "no reward model"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            rl(rl_recipe(world, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GaleError, match="runs in one process"):
        rl(rl_recipe(world), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers_per_prompt": 3}, "must be a multiple of"),
        ({"updates_per_rollout": 4, "checkpoint_every": 6}, "checkpoint_every"),
        ({"answers_per_prompt": 1}, "at least 2"),
        ({"answer_tokens": CONTEXT}, "must exceed answer_tokens"),
        ({"gamma": 0.9}, "gamma mean nothing to grpo"),
        ({"compile": True}, "compile is of no use"),
        ({"reward": {}}, "give either model"),
    ],
)
def test_recipes_that_do_not_add_up_are_refused(world: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rl_recipe(world, **changes)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_adapters_are_trained_and_written_in_place_of_the_model(
    world: dict[str, Path], tmp_path: Path, algorithm: str
) -> None:
    changes: dict[str, Any] = {"steps": 2, "optimiser": {"learning_rate": 0.02, "warmup_steps": 0}}
    rl(rl_recipe(world, algorithm, lora={"rank": 4, "alpha": 8.0}, **changes), tmp_path / "one")
    adapter = tmp_path / "one" / "model"
    assert not (adapter / "config.json").exists()
    state = load_file(tmp_path / "one" / "checkpoints" / "step-00000002" / "state.safetensors")
    trained = {name for name in state if name.startswith("master/")}
    assert all("lora_" in name or name == "master/critic.score.weight" for name in trained)
    rl(rl_recipe(world, algorithm, lora={"adapter": adapter}, **changes), tmp_path / "two")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one[0]["kl"] == two[0]["kl"] == 0  # the reference is where a run begins
    assert one[1]["kl"] != 0
    merge_adapter(adapter, world["base"], tmp_path / "merged", dtype=torch.float32)
    before, after = (load_model(folder, dtype=torch.float32) for folder in (world["base"], tmp_path / "merged"))
    assert not torch.equal(before.layers[0].mlp.up_proj.weight, after.layers[0].mlp.up_proj.weight)


def test_the_best_of_several_answers_are_kept_as_data(world: dict[str, Path], tmp_path: Path) -> None:
    fields = {
        "data": world["new"],
        "base": world["base"],
        "reward": WITH_LOVE,
        "gold": {"verifier": "f1"},
        "n": 8,
        "answer_tokens": 24,
        "at_once": 5,
        "precision": "fp32",
    }
    summary = best_of_n(BestOfNRecipe.model_validate(fields), tmp_path / "all")
    rewards = [point["reward"] for point in summary["best_of"]]
    assert [point["n"] for point in summary["best_of"]] == [1, 2, 4, 8]
    assert rewards == sorted(rewards)
    assert rewards[0] < 0.5 < rewards[3]
    rows = [json.loads(line) for line in (tmp_path / "all" / "best.jsonl").read_text().splitlines()]
    assert len(rows) == summary["kept"] == summary["prompts"] == 16
    assert np.mean([row["reward"] for row in rows]) == pytest.approx(rewards[3])
    for row in rows:
        assert ("love" in row["messages"][1]["content"]) == row["reward"]
    chosen = best_of_n(BestOfNRecipe.model_validate(fields | {"least_reward": 1.0}), tmp_path / "good")
    assert chosen["kept"] == sum(row["reward"] for row in rows)
    sources = [{"path": tmp_path / "good/best.jsonl", "format": "chat", "licence": "x", "origin": "x"}]
    prepare(DataRecipe.model_validate({"tokenizer": world["tokenizer"], "sources": tuple(sources)}), tmp_path / "data")
    impossible = BestOfNRecipe.model_validate(fields | {"least_reward": 2.0})
    with pytest.raises(DataError, match="No answer was good enough"):
        best_of_n(impossible, tmp_path / "none")


@pytest.mark.parametrize("page", ["reinforcement-learning.md", "reinforcement-learning.zh.md"])
def test_the_recipes_of_the_page_are_valid(tmp_path: Path, page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", text, re.DOTALL))
    for name, kind in (("grpo.toml", RlRecipe), ("best.toml", BestOfNRecipe)):
        (tmp_path / name).write_text(blocks[name], encoding="utf-8")
        load_recipe(tmp_path / name, kind)
