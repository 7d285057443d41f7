"""The child process of a fine-tuning job, as its supervisor sees it: started, watched, read and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from gale.core.settings import settings
from gale.train.metrics import METRICS

Phase = Literal["validate", "train"]
LOG = "process.log"


def share_of_threads() -> int:
    """Half of what serving may use, so that answers go on beside a training."""
    return max(1, (settings().threads or os.cpu_count() or 1) // 2)


@contextlib.asynccontextmanager
async def running(phase: Phase, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of :mod:`gale.train.job` at work in ``folder``, dead when the block ends.

    It lives in a session of its own, so that Ctrl-C reaches the server only, and ends when its standard input does,
    which a killed server cannot hold open.
    """
    threads = str(share_of_threads())
    with (folder / LOG).open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gale.train.job",
            phase,
            str(folder),
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, "GALE_THREADS": threads, "OMP_NUM_THREADS": threads},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def how_it_ended(process: asyncio.subprocess.Process) -> str:
    """In words, for a process that left no result."""
    status = process.returncode or 0
    if status >= 0:
        return f"ended with the status {status}"
    name = signal.Signals(-status).name
    return f"was stopped by {name}" + (", perhaps for lack of memory" if -status == signal.SIGKILL else "")


class Metrics:
    """The steps in a run's ``metrics.jsonl`` as they are written, each once, however often it is resumed."""

    def __init__(self, run: Path, after_step: int) -> None:
        self._path = run / METRICS
        self._step = after_step
        self._file, self._read = 0, 0  # which file of that name, and how much of it

    def new(self) -> list[dict[str, Any]]:
        """What has come since the last call."""
        try:
            with self._path.open("rb") as file:
                if (number := os.fstat(file.fileno()).st_ino) != self._file:
                    self._file, self._read = number, 0
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        rows = []
        for line in whole.splitlines():
            row = json.loads(line)
            if row.get("step", 0) > self._step:
                self._step = row["step"]
                rows.append(row)
        return rows
