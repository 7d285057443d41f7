"""Several processes train one run: the same rows, the same losses, one set of files, whatever their number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gale.core.errors import GaleError
from gale.train.pretrain import pretrain
from tests.train.runs import free_port, metrics, recipe, write_toml

OPTIMISER = {"learning_rate": 0.01, "warmup_steps": 2}


def wanted(prepared: Path, **optimiser: Any) -> Any:
    return recipe(prepared, batch_rows=8, export="fp32", evaluate_rows=3, optimiser=OPTIMISER | optimiser)


def torchrun(processes: int, *arguments: str | Path, home: Path) -> str:
    """What ``torchrun ... -m gale.cli`` printed with ``arguments``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, *address, "-m", "gale.cli", *map(str, arguments)],
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
        assert one.get("held_out", {}) == pytest.approx(two.get("held_out", {}), abs=1e-5)


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
    assert "machine.processes: 1 then, 2 now" in output
    assert_same_curve(tmp_path / "one", tmp_path / "two")


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
