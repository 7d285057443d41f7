"""Metrics as TensorBoard event files, for those who watch several runs side by side.

TensorBoard is an optional extra; the report needs nothing of it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.errors import GaleError
from gale.train.metrics import METRICS
from gale.train.run_log import numbers_of, read_run

FOLDER = "tensorboard"


class TensorBoardLog:
    """Event files in ``folder``, a row of metrics at a time. Events after ``keep_until`` of an earlier start are void.

    Raises :class:`GaleError` where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, keep_until: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise GaleError(
                "TensorBoard is not installed.", hint="Install it with: pip install 'gale-llm[tensorboard]'"
            ) from error
        with files.explain_disk_errors(folder):
            self._writer = SummaryWriter(str(folder), purge_step=keep_until + 1)

    def append(self, row: dict[str, Any], *, time: float | None = None) -> None:
        """Write every number of a row, and its samples; ``time`` is when it happened, in seconds since 1970."""
        step = int(row["step"])
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(name, value, step, walltime=time)
        for number, sample in enumerate(row.get("samples") or []):
            content = f"{sample.get('prompt', '')}{sample.get('text', '')}"
            self._writer.add_text(f"samples/{number}", content, step, walltime=time)

    def close(self) -> None:
        """Write out what is still in memory."""
        self._writer.close()


def write_tensorboard(run: Path) -> Path:
    """Turn the metrics of a run into event files in its folder ``tensorboard``, in place of any that are there."""
    log = read_run(run)
    try:
        time = datetime.fromisoformat(str(log.header.get("started"))).timestamp()
    except ValueError:
        time = (run / METRICS).stat().st_mtime - sum(row.get("seconds", 0.0) for row in log.rows)
    with files.new_directory(run / FOLDER) as folder:
        writer = TensorBoardLog(folder)
        for row in log.rows:
            time += float(row.get("seconds", 0.0))
            writer.append(row, time=time)
        writer.close()
    return run / FOLDER
