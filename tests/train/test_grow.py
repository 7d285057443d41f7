"""``gale train grow``: training goes on where the base stood, resumes in the same bits, and refuses what cannot fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gale.cli.train import app
from gale.core.errors import CheckpointError, DataError, GaleError, ModelError
from gale.core.recipe import load_recipe
from gale.model.checkpoint import load_model, save_model
from gale.model.config import ModelConfig
from gale.model.grow import logit_difference
from gale.model.transformer import Decoder
from gale.train.grow import grow, grow_only, grown_from
from gale.train.next_token import next_token
from gale.train.parallel import World
from gale.train.pretrain import pretrain
from gale.train.recipe import GrowRecipe, Growth
from tests.train.runs import gale, metrics, recipe

WIDER = {"hidden_size": 32, "intermediate_size": 48, "heads": 4, "kv_heads": 2}
GROWTHS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "deeper": {"layers": 3},
    "interleaved": {"layers": 2, "placement": "interleave"},
    "wider": WIDER,
    "experts": {"experts": {"count": 4, "per_token": 2}},
    "all": {"layers": 2, **WIDER, "experts": {"count": 3, "per_token": 1}},
}


@pytest.fixture(scope="module")
def base(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that has learned a little."""
    run = tmp_path_factory.mktemp("base")
    pretrain(recipe(prepared, steps=30, export="fp32"), run / "run")
    return run / "run" / "model"


def grow_recipe(prepared: Path, base: Path, growth: dict[str, Any], **changes: Any) -> GrowRecipe:
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"})
    return GrowRecipe.model_validate(fields | {"base": base, "grow": growth, "export": "fp32"} | changes)


def held_out(model: Decoder, settings: GrowRecipe) -> float:
    with torch.no_grad():
        return next_token(settings, settings.data, loss_on="all", long="split").evaluate(model, World())["english"]


@pytest.mark.parametrize("name", GROWTHS)
def test_training_begins_with_the_loss_of_the_base(name: str, prepared: Path, base: Path, tmp_path: Path) -> None:
    settings = grow_recipe(prepared, base, GROWTHS[name])
    source = load_model(base, dtype=torch.float32)
    grown = grown_from(source, settings.grow, settings.seed)
    before = held_out(source, settings)
    assert held_out(grown, settings) == pytest.approx(before, abs=1e-5)

    grow(settings, tmp_path / "run")
    same = grow_recipe(prepared, base, {})
    grow(same, tmp_path / "same")
    first, expected = metrics(tmp_path / "run")[0]["loss"], metrics(tmp_path / "same")[0]["loss"]
    assert first == pytest.approx(expected, abs=1e-5)

    report = json.loads((tmp_path / "run/model/growth.json").read_text())
    assert report["function_preserving"] is True
    assert report["max_logit_difference"] < 1e-5
    assert report["held_out"]["base"]["english"] == pytest.approx(before, abs=1e-6)
    assert report["held_out"]["grown"]["english"] == pytest.approx(before, abs=1e-5)
    finished = load_model(tmp_path / "run/model", dtype=torch.float32)
    assert finished.config == grown.config
    assert logit_difference(finished, source)[0] > 1e-3  # it has learned since


@pytest.mark.parametrize("name", ["wider", "experts"])
def test_a_grown_run_that_was_killed_ends_in_the_same_bits(
    name: str, prepared: Path, base: Path, tmp_path: Path
) -> None:
    settings = grow_recipe(prepared, base, GROWTHS[name])
    grow(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step-00000006")
    shutil.rmtree(tmp_path / "killed/model")
    grow(settings, tmp_path / "killed", resume=True)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for file in ("model.safetensors", "growth.json"):
        assert (tmp_path / "killed/model" / file).read_bytes() == (tmp_path / "whole/model" / file).read_bytes()


def test_a_run_does_not_go_on_with_another_base_or_growth(prepared: Path, base: Path, tmp_path: Path) -> None:
    grow(grow_recipe(prepared, base, {"layers": 2}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"recipe\.grow\.layers: 2 then, 3 now"):
        grow(grow_recipe(prepared, base, {"layers": 3}), tmp_path / "run", resume=True)
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match="base_fingerprint"):
        grow(grow_recipe(prepared, tmp_path / "other", {"layers": 2}), tmp_path / "run", resume=True)


def test_only_growing_writes_a_folder_of_the_same_function(prepared: Path, base: Path, tmp_path: Path) -> None:
    settings = grow_recipe(prepared, base, GROWTHS["all"], export="bf16")
    report = grow_only(settings, tmp_path / "model")
    opened = load_model(tmp_path / "model", dtype=torch.float32)
    assert logit_difference(load_model(base, dtype=torch.float32), opened)[0] < 1e-5
    assert json.loads((tmp_path / "model/growth.json").read_text()) == report
    assert report["growth"]["experts"]["count"] == 3
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert sum(p.numel() for p in theirs.parameters()) == report["parameters"]["grown"]


def test_what_does_not_keep_the_function_says_so(
    prepared: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = {"layers": 2, "preserve": False, "experts": {"count": 4, "per_token": 2, "redrawn": 0.5}}
    report = grow_only(grow_recipe(prepared, base, growth), tmp_path / "model")
    assert report["function_preserving"] is False
    assert report["max_logit_difference"] > 1e-3
    said = capsys.readouterr().err
    assert "does not keep the function (whole copies of layers and 50% of each expert's units drawn anew)" in said
    assert f"{report['max_logit_difference']:.3g}" in said


def test_a_base_whose_scores_are_no_numbers_is_refused(prepared: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(ModelError, match="more than rounding"):
        grow_only(grow_recipe(prepared, tmp_path / "broken", {"layers": 2}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_vocabulary_is_refused(prepared: Path, tmp_path: Path) -> None:
    save_model(Decoder(ModelConfig("qwen3", 100, 16, 16, 1, 2, 1, 8, 64)), tmp_path / "small")
    with pytest.raises(DataError, match="100"):
        grow(grow_recipe(prepared, tmp_path / "small", {"layers": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sizes_that_cannot_be_are_refused_before_anything_is_written(
    prepared: Path, base: Path, tmp_path: Path
) -> None:
    for growth, reason in (({"hidden_size": 24}, "whole multiple"), ({"layers": 1}, "deeper")):
        with pytest.raises(GaleError, match=reason):
            grow(grow_recipe(prepared, base, growth), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"per_token \(3\) must not exceed count \(2\)"):
        Growth.model_validate({"experts": {"count": 2, "per_token": 3}})


def test_the_command_grows_and_trains(prepared: Path, base: Path, tmp_path: Path) -> None:
    settings = grow_recipe(prepared, base, {"layers": 2}).model_dump(mode="json")
    optimiser = settings["optimiser"]
    lines = [f"{key} = {json.dumps(settings[key])}" for key in ("data", "base", "steps", "batch_rows", "micro_rows")]
    lines += [f"row_tokens = {settings['row_tokens']}", "[grow]", "layers = 2", "[optimiser]"]
    lines += [f"learning_rate = {optimiser['learning_rate']}", "warmup_steps = 2"]
    (tmp_path / "grow.toml").write_text("\n".join(lines))
    done = CliRunner().invoke(app, ["grow", str(tmp_path / "grow.toml"), "--only", "--out", str(tmp_path / "only")])
    assert done.exit_code == 0, done.output
    assert f"Model written to {tmp_path / 'only/model'}" in done.output
    assert not (tmp_path / "only/metrics.jsonl").exists()
    output = gale("train", "grow", tmp_path / "grow.toml", "--out", tmp_path / "run", home=tmp_path)
    assert "the optimiser starts afresh" in output
    assert "nats per token before" in output
    assert (tmp_path / "run/model/growth.json").is_file()


@pytest.mark.parametrize("page", ["growing.md", "growing.zh.md"])
def test_the_recipes_of_the_page_and_of_the_folder_are_valid(page: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (content,) = re.findall(r"```toml\n(.*?)```", (root / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "grow.toml").write_text(content, encoding="utf-8")
    assert load_recipe(tmp_path / "grow.toml", GrowRecipe).grow.layers == 24
    assert load_recipe(root / "recipes" / "smoke-grow.toml", GrowRecipe).grow.experts is not None
