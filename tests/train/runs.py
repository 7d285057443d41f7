"""Tiny training runs: a recipe small enough to train in a second, and the same run in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from gale.core.recipe import Recipe
from gale.train.recipe import PretrainRecipe

# Keys that measure the machine, not the run.
TIMING = ("seconds", "cpu_seconds", "tokens_per_second")


def recipe(data: Path, **changes: Any) -> PretrainRecipe:
    """A recipe of 6 steps over ``data``; ``changes`` replace whole fields."""
    fields: dict[str, Any] = {
        "data": str(data),
        "steps": 6,
        "batch_rows": 4,
        "micro_rows": 2,
        "row_tokens": 48,
        "precision": "fp32",
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "layers": 1,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 8,
            "context_length": 48,
        },
        "optimiser": {"learning_rate": 0.01, "warmup_steps": 2},
    }
    return PretrainRecipe.model_validate(fields | changes)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run without timing."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows if "step" in row]


def start_gale(*arguments: str | Path, home: Path) -> subprocess.Popen[str]:
    """``gale`` with ``arguments`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gale.cli", *map(str, arguments)],
        env={**os.environ, "GALE_HOME": str(home), "GALE_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def gale(*arguments: str | Path, home: Path) -> str:
    """What ``gale`` printed; it must have succeeded."""
    process = start_gale(*arguments, home=home)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_toml(path: Path, recipe: Recipe) -> Path:
    """A recipe as the file that it could have come from."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in content.items() if key not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)]
    path.write_text("\n".join(lines) + "\n")
    return path
