"""One dial: a valid recipe at every setting, larger with every turn, within its budget, and what is given wins."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gale.core.errors import GaleError, RecipeError
from gale.core.recipe import load_recipe
from gale.train.dial import Dial, dial_recipe, turn_dial
from gale.train.recipe import PretrainRecipe
from tests.train.runs import gale, metrics, start_gale

RECIPES = Path(__file__).parents[2] / "recipes"
DEPTHS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 20, 24, 31, 32, 64]


def turned(depth: int | None = None, flops: float | None = None, **given: Any) -> Dial:
    rest = {key.replace("__", "."): value for key, value in given.items()}
    return turn_dial(depth=depth, flops=flops, vocabulary_size=6400, row_tokens=512, given=rest)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_makes_a_valid_recipe_whose_every_value_has_a_reason(depth: int) -> None:
    dial = turned(depth)
    content: dict[str, Any] = {"data": "somewhere"}
    dial.complete(content)
    recipe = PretrainRecipe.model_validate(content)
    shape = recipe.model
    assert shape.layers == depth
    assert shape.heads * shape.head_dim == shape.hidden_size
    assert shape.heads % shape.kv_heads == 0
    assert recipe.batch_rows % recipe.micro_rows == 0
    assert recipe.optimiser.warmup_steps < recipe.steps
    assert dial.reasons.keys() == dial.values.keys()
    assert all(dial.reasons.values())
    assert dial.tokens == recipe.steps * recipe.batch_rows * recipe.row_tokens
    assert dial.tokens == pytest.approx(20 * dial.parameters, rel=0.06)


def test_with_every_turn_all_grows_but_the_learning_rate() -> None:
    dials = [turned(depth) for depth in DEPTHS]
    for smaller, larger in itertools.pairwise(dials):
        for key in ("model.hidden_size", "model.intermediate_size", "batch_rows"):
            assert smaller.values[key] <= larger.values[key]
        assert smaller.parameters < larger.parameters
        assert smaller.tokens < larger.tokens
        assert smaller.flops < larger.flops
        assert smaller.values["optimiser.learning_rate"] >= larger.values["optimiser.learning_rate"]


@pytest.mark.parametrize("flops", [1e14, 3.3e15, 1e17, 4e19, 1e21, 5.9e23])
def test_a_budget_is_spent_whole_on_the_deepest_model_it_can_train(flops: float) -> None:
    dial = turned(flops=flops)
    assert dial.flops == pytest.approx(flops, rel=0.06)
    assert dial.tokens > 0.94 * 20 * dial.parameters
    deeper = turned(dial.values["model.layers"] + 1)
    assert deeper.flops > flops


def test_the_two_dials_agree() -> None:
    for depth in (4, 12, 24):
        by_depth = turned(depth)
        by_flops = turned(flops=by_depth.flops * 1.05)
        assert by_flops.values["model.layers"] == depth
        assert by_flops.values["model.hidden_size"] == by_depth.values["model.hidden_size"]


def test_the_learning_rate_goes_through_the_recipes_that_were_measured() -> None:
    for name in ("smoke.toml", "builtin/pretrain.toml"):
        recipe = tomllib.loads((RECIPES / name).read_text())
        dial = turned(6, model__hidden_size=recipe["model"]["hidden_size"])
        assert dial.values["optimiser.learning_rate"] == pytest.approx(recipe["optimiser"]["learning_rate"], rel=0.05)


def test_what_the_recipe_says_wins_and_what_follows_from_it_follows() -> None:
    dial = turned(12, model__hidden_size=512, micro_rows=6, steps=100, optimiser__learning_rate=0.5)
    assert dial.values["model.heads"] == 8
    assert dial.values["model.intermediate_size"] == 1344
    assert dial.values["batch_rows"] % 6 == 0
    assert dial.tokens == 100 * dial.values["batch_rows"] * 512
    for key in ("model.hidden_size", "micro_rows", "steps", "optimiser.learning_rate"):
        assert dial.reasons[key] == "as given"
    assert turned(flops=1e18, model__layers=3).values["model.layers"] == 3


def test_settings_that_make_no_model_are_messages() -> None:
    for arguments in ({}, {"depth": 3, "flops": 1e15}):
        with pytest.raises(GaleError, match="one dial"):
            turned(**arguments)
    with pytest.raises(GaleError, match="depth of 0"):
        turned(0)
    with pytest.raises(GaleError, match="too few") as caught:
        turned(flops=10.0)
    least = float(str(caught.value.hint).split()[1])
    assert turned(flops=1.05 * least).values["model.layers"] == 1


def test_a_recipe_is_completed_by_the_vocabulary_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text('{"vocabulary_size": 999}')
    (tmp_path / "short.toml").write_text('data = "data"\nseed = 9\n[model]\ntied_embeddings = false\n')
    seen: list[Dial] = []

    def complete(content: dict[str, Any], find: Any) -> None:
        seen.append(dial_recipe(content, find(content["data"]), depth=2, flops=None, prepare=False))

    recipe = load_recipe(tmp_path / "short.toml", PretrainRecipe, ["steps=7"], complete=complete)
    assert (recipe.seed, recipe.steps, recipe.model.layers, recipe.model.tied_embeddings) == (9, 7, 2, False)
    body = 2 * (128 * 64 * (2 * 2 + 2 * 1) + 3 * 128 * 320)
    assert seen[0].parameters == body + 999 * 128
    with pytest.raises(RecipeError, match=r"model\.heads"):  # nonsense is named by the recipe's own check
        load_recipe(tmp_path / "short.toml", PretrainRecipe, ["model.heads=many"], complete=complete)
    (tmp_path / "data/manifest.json").unlink()
    with pytest.raises(GaleError, match="not known yet"):
        load_recipe(tmp_path / "short.toml", PretrainRecipe, complete=complete)


def test_a_dry_run_prints_the_recipe_and_the_reasons_and_a_real_one_trains_it(tmp_path: Path) -> None:
    process = start_gale("train", "pretrain", RECIPES / "dial.toml", "--depth", "1", "--dry-run", home=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Hoffmann et al. 2022" in output
    assert "as given" in output
    recipe = json.loads(output[output.index("{") :])
    assert recipe["model"]["layers"] == 1
    assert not (tmp_path / "runs").exists()
    arguments = ("--depth", "1", "--out", tmp_path / "run", "steps=3", "batch_rows=2")
    assert "final loss" in gale("train", "pretrain", RECIPES / "dial.toml", *arguments, home=tmp_path)
    assert metrics(tmp_path / "run")[-1]["step"] == 3
