"""A run's ``metrics.jsonl`` read back for people: the one file from which everything about a run can be told.

Every line but the header is one step, ``{"step": ..., "tokens": ..., "loss": ..., ...}``, with any further numbers and
tables of numbers, such as the held-out losses, and now and then ``"samples": [{"prompt": ..., "text": ...}]``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gale.core.errors import DataError
from gale.train.metrics import METRICS

AXES = ("step", "tokens")  # what other numbers are drawn over


@dataclass(slots=True)
class RunLog:
    """What a run wrote down: one row a step in their order, the newest header, and how often it was started."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    starts: int = 0
    unreadable_lines: int = 0

    def series(self) -> dict[str, tuple[list[int], list[float]]]:
        """Every number of the rows by name, as row indices and values; tables are taken apart into ``table/name``."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for index, row in enumerate(self.rows):
            for name, value in numbers_of(row).items():
                indices, values = found.setdefault(name, ([], []))
                indices.append(index)
                values.append(value)
        return found


def read_run(run: Path) -> RunLog:
    """The metrics of the run in folder ``run``, which may still be going on or have been killed within a line.

    Raises :class:`DataError` where there are none.
    """
    path = run / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(
            f"{run} holds no {METRICS}.", hint="Give the folder of a run, the --out of `gale train`."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    log, rows = RunLog(), {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("not an object")
            if "header" in content:
                started = log.header.get("started", content["header"].get("started"))
                log.header = {**content["header"], "started": started}
                log.starts += 1
            else:
                rows[int(content["step"])] = content  # a step done again after a resume replaces the first
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) - 1:  # half a last line is what a kill leaves, or a step that is being written
                log.unreadable_lines += 1
    log.rows = [rows[step] for step in sorted(rows)]
    return log


def numbers_of(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row, without those that others are drawn over."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value) and (prefix or key not in AXES):
            found[prefix + key] = float(value)
    return found
