"""Seconds from the command to an answering server, once everything is installed and built.

    .venv/bin/python bench/start.py [--rounds 3] [--models built-in 134M 473M] [--weights bf16 int8 int4]

The built-in model by `make run`, the random models of bench/serve.py by `gale serve`, twice a round: the first start
rounds the weights and keeps them on disk, the second finds them. Prints medians, and in brackets the slowest; the first
of all may read from a cold disk cache.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serve import HERE, SHAPES, make_models

from gale.core.settings import settings
from gale.model.kernels import available

_BUILT_IN = "built-in"


def main() -> None:
    """Start, wait for the line with the address, stop; a table of it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    models = [_BUILT_IN, *SHAPES]
    arguments.add_argument("--models", nargs="+", choices=models, default=models)
    arguments.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--work", type=Path, default=HERE.parent / "runs" / "bench-serve", help="folder for models")
    asked = arguments.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(asked.threads), "GALE_THREADS": str(asked.threads)}
    available()  # builds them
    print("| | first start, s | second start, s |")
    print("|---|---|---|")
    for shape in asked.models:
        if shape == _BUILT_IN:
            report("make run, built-in model", ["make", "run", "ARGS=--port 0"], asked.rounds)
            continue
        make_models(asked.work / shape, shape, None)
        for weights in asked.weights:
            serve = [sys.executable, "-m", "gale.cli", "serve", "--port", "0", "--weights", weights]
            report(f"{shape}, {weights}", [*serve, "--model", str(asked.work / shape)], asked.rounds)


def report(label: str, command: list[str], rounds: int) -> None:
    """Print a row: so many times, in a home without anything but the built kernels, the first and the second start."""
    starts: list[list[float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as home:
            Path(home, "kernels").symlink_to(settings().home / "kernels")
            starts.append([seconds_until_ready(command, home) for _ in range(2)])
    cells = (f"{statistics.median(column):.1f} ({max(column):.1f})" for column in zip(*starts, strict=True))
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def seconds_until_ready(command: list[str], home: str) -> float:
    """Start a server and stop it when it has said that it is ready; what it still writes is waited for."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env={**os.environ, "GALE_HOME": home},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    if not any("ready at" in line for line in process.stdout):
        raise SystemExit(f"It did not start: {' '.join(command)}")
    seconds = time.perf_counter() - began
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    return seconds


if __name__ == "__main__":
    main()
