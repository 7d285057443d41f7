"""``metrics.jsonl``: what a run did, one JSON object a line, from which :mod:`gale.train.report` makes its report.

The first line is a header: ``{"header": {"stage", "started", "gale", "commit", "machine", "recipe", ...}}``. Each
further line is a step, or another header where the run was resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gale
from gale.core import files

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends a line a step; lines past a resumed step are dropped, they will be computed again.

    A line is on disk, or lost, as the system likes; :meth:`sync` makes what was appended survive a power cut.
    """

    def __init__(self, path: Path, keep_until: int, header: dict[str, Any]) -> None:
        kept = list(_read(path)) if keep_until and path.is_file() else []
        lines = [row for row in kept if "header" in row or row.get("step", keep_until + 1) <= keep_until]
        self._rows = [row for row in lines if "step" in row]
        self._path = path
        lines.append({"header": header})
        files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def append(self, row: dict[str, Any]) -> None:
        """Write the row of one step."""
        self._rows.append(row)
        with files.explain_disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Wait until all rows are on disk."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def last(self) -> dict[str, Any] | None:
        """The newest row."""
        return self._rows[-1] if self._rows else None

    def total(self, key: str) -> float:
        """The sum of one figure over all rows."""
        return float(sum(row[key] for row in self._rows))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Header and rows of a metrics file, up to the half line that a killed run may leave."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        yield row


def header(stage: str, recipe: dict[str, Any], machine: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Where, when and from what a run was started."""
    return {
        "stage": stage,
        "started": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "gale": gale.__version__,
        "commit": _commit(),
        "machine": machine,
        **facts,
        "recipe": recipe,
    }


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, None where it is installed without one."""
    folder = Path(gale.__file__).parent
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
