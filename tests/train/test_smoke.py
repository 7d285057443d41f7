"""``gale train pretrain recipes/smoke.toml``: the loss it promises, and a killed run that ends in the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.runs import gale, metrics, start_gale

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.toml"
STEPS, TOKENS, THRESHOLD = 200, 204_800, 1.0  # as the recipe's comment says


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Return once the run in ``out`` has logged ``step``."""
    path = out / "metrics.jsonl"
    while not path.is_file() or path.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
def test_the_smoke_recipe_keeps_its_promise_and_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    home, whole, killed = tmp_path / "home", tmp_path / "whole", tmp_path / "killed"
    output = gale("train", "pretrain", RECIPE, "--out", whole, home=home)
    final = json.loads((whole / "summary.json").read_text())["final"]
    assert (final["step"], final["tokens"]) == (STEPS, TOKENS)
    assert final["loss"] < THRESHOLD
    assert f"final loss {final['loss']!r} at {TOKENS:,} tokens" in output

    process = start_gale("train", "pretrain", RECIPE, "--out", killed, home=home)
    wait_for_step(process, killed, STEPS // 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()

    output = gale("train", "pretrain", RECIPE, "--out", killed, "--resume", home=home)
    assert "Going on after step" in output
    assert metrics(killed) == metrics(whole)
    for name in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
