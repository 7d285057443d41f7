"""``gale serve`` over the scripted engine as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(
    home: Path, log: IO[str] | int = subprocess.DEVNULL, prepare: Callable[[], None] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, killed at the end, and its address. ``prepare`` is called in it before it becomes Gale."""
    command = [sys.executable, "-m", "tests.server.serve_scripted", "--port", "0"]
    environment = {**os.environ, "GALE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, preexec_fn=prepare
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()[4]
        finally:
            process.kill()
