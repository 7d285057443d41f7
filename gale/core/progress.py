"""One look for all long work: a bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Progress is for people and goes to stderr; stdout is kept for results.
console = Console(stderr=True, highlight=False)
_PLAIN_INTERVAL_SECONDS = 30.0


class Bar:
    """Progress of one piece of work over ``total`` steps; ``note`` is free text such as the loss.

    ``silent`` shows nothing: of several processes at one piece of work only one talks.
    """

    def __init__(self, title: str, total: int, start: int = 0, *, silent: bool = False) -> None:
        self._title, self._total, self._done, self._silent = title, total, start, silent
        self._live = sys.stderr.isatty() and not silent
        self._last_plain = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Count ``steps`` as done."""
        self._done += steps
        self._progress.update(self._task, completed=self._done, note=note)
        if not (self._live or self._silent) and (
            time.monotonic() - self._last_plain > _PLAIN_INTERVAL_SECONDS or self._done == self._total
        ):
            self._last_plain = time.monotonic()
            console.print(f"{self._title} {self._done}/{self._total} {note}", soft_wrap=True, markup=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._silent:
            return
        self._progress.console.print(text, soft_wrap=True, markup=False)
