"""Several processes train one run: the same rows, the same losses, one set of files, whatever their number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gale.core.errors import GaleError
from gale.core.recipe import Recipe
from gale.text.tokenizer import Tokenizer
from gale.train.pretrain import pretrain
from gale.train.recipe import DpoRecipe, GrowRecipe, RewardRecipe, SftRecipe
from tests.train.preferences import ROWS, prepare_pairs, save_base
from tests.train.preferences import recipe as tuning_recipe
from tests.train.run_stages import STAGES
from tests.train.runs import free_port, metrics, recipe, write_toml

OPTIMISER = {"learning_rate": 0.01, "warmup_steps": 2}


def wanted(prepared: Path, **optimiser: Any) -> Any:
    return recipe(prepared, batch_rows=8, export="fp32", evaluate_rows=3, optimiser=OPTIMISER | optimiser)


def torchrun(processes: int, *arguments: str | Path, home: Path, module: str = "gale.cli") -> str:
    """What ``torchrun ... -m module`` printed with ``arguments``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, *address, "-m", module, *map(str, arguments)],
        env={**os.environ, "GALE_HOME": str(home), "GALE_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    return output if done.returncode == 0 else pytest.fail(output)


def assert_same_curve(first: Path, second: Path) -> None:
    for one, two in zip(metrics(first), metrics(second), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["tokens"] == two["tokens"]
        for key in ("held_out", "held_out_average"):
            assert one.get(key, {}) == pytest.approx(two.get(key, {}), abs=1e-5)
        assert one.get("samples") == two.get("samples")


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "model").glob("*.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_two_processes_follow_the_curve_of_one_and_the_number_may_change_on_resume(
    prepared: Path, tmp_path: Path, algorithm: str
) -> None:
    settings = wanted(prepared, algorithm=algorithm, ema_decay=0.5)
    pretrain(settings, tmp_path / "one")
    toml = write_toml(tmp_path / "recipe.toml", settings)
    output = torchrun(2, "train", "pretrain", toml, "--out", tmp_path / "two", home=tmp_path)
    assert output.count("Model written to") == 1
    assert_same_curve(tmp_path / "one", tmp_path / "two")

    for path in (tmp_path / "one/checkpoints").iterdir():
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    output = torchrun(2, "train", "pretrain", toml, "--out", tmp_path / "one", "--resume", home=tmp_path)
    assert output.count("machine.processes: 1 then, 2 now") == 1
    assert_same_curve(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_every_stage_follows_the_curve_of_one_process(prepared: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = save_base(tokenizer, tmp_path / "base")
    pairs = prepare_pairs(tokenizer, tmp_path / "pairs", ROWS[:5], ROWS[5:])
    large = {"batch_rows": 8, "export": "fp32", "evaluate_rows": 3}
    samples = {"sample_every": 2, "sample_prompts": ("The",), "sample_tokens": 4}
    adapters = {"lora": {"rank": 2, "dropout": 0.3}, "optimiser": OPTIMISER}
    experts = {"count": 4, "per_token": 2}
    mixture = wanted(prepared).model.model_dump() | {"experts": experts | {"intermediate_size": 16}}
    cases: dict[str, tuple[str, Recipe]] = {
        "average": ("pretrain", recipe(prepared, **large, **samples, optimiser=OPTIMISER | {"ema_decay": 0.5})),
        "experts": ("pretrain", recipe(prepared, **large, model=mixture, optimiser=OPTIMISER)),
        "grown": ("grow", tuning_recipe(GrowRecipe, prepared, base, **samples, grow={"experts": experts})),
        "adapters": ("sft", tuning_recipe(SftRecipe, prepared, base, **adapters, **samples)),
        "reward": ("reward", tuning_recipe(RewardRecipe, pairs, base)),
        "reward-adapters": ("reward", tuning_recipe(RewardRecipe, pairs, base, **adapters)),
        "dpo": ("dpo", tuning_recipe(DpoRecipe, pairs, base, **adapters)),
    }
    (tmp_path / "two").mkdir()
    for name, (stage, settings) in cases.items():
        content = {"stage": stage, "recipe": settings.model_dump(mode="json")}
        (tmp_path / "two" / f"{name}.json").write_text(json.dumps(content))
    torchrun(2, tmp_path / "two", home=tmp_path, module="tests.train.run_stages")
    for name, (stage, settings) in cases.items():
        run, kind = STAGES[stage]
        run(kind.model_validate(settings.model_dump()), tmp_path / "one" / name)
        assert_same_curve(tmp_path / "one" / name, tmp_path / "two" / name)
        one, two = (weights(tmp_path / number / name) for number in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_rows_that_cannot_be_dealt_out_evenly_are_refused(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gale.train import loop
    from gale.train.parallel import World

    stand_in = World(rank=0, size=3)
    monkeypatch.setattr(loop, "joined", lambda: _Joined(stand_in))
    with pytest.raises(GaleError, match=r"4 pieces of 2 rows cannot be dealt out evenly to 3 processes"):
        pretrain(wanted(prepared), tmp_path / "run")


class _Joined:
    def __init__(self, world: Any) -> None:
        self._world = world

    def __enter__(self) -> Any:
        return self._world

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.slow
def test_ray_train_runs_the_same_recipe_on_two_nodes(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = Path(__file__).with_name("train_on_ray.py")
    toml = write_toml(tmp_path / "recipe.toml", wanted(prepared))
    done = subprocess.run(
        [sys.executable, script, toml, tmp_path / "ray"],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "GALE_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broke down" in done.stdout  # what a worker raises arrives as it was
    pretrain(wanted(prepared), tmp_path / "one")
    assert_same_curve(tmp_path / "one", tmp_path / "ray")
