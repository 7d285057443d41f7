"""What a batch at work has done: its two files of answers, to which each line's answer is added when it is there.

A killed process leaves at most a last line without its end, which is cut off; whoever takes the batch up again reads
which lines are done and does the others. What was added is in the system's hands at once and on the disk a moment
later, so a killed process loses nothing and a power cut the last moment.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gale.core.files import locked
from gale.platform.errors import LeaseLostError
from gale.platform.file_folder import explained

Kind = Literal["output", "errors"]


@dataclass
class Tokens:
    """Tokens of all answers together."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def add(self, usage: Any) -> None:
        """Those of one answer, whichever names its endpoint has for them."""
        if not isinstance(usage, dict):
            return

        def count(*names: str, of: dict[str, Any]) -> int:
            return sum(of.get(name) or 0 for name in names)

        read = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
        written = usage.get("output_tokens_details") or usage.get("completion_tokens_details") or {}
        self.input += count("input_tokens", "prompt_tokens", of=usage)
        self.cached += count("cached_tokens", of=read)
        self.output += count("output_tokens", "completion_tokens", of=usage)
        self.reasoning += count("reasoning_tokens", of=written)

    @property
    def shown(self) -> dict[str, Any]:
        """As OpenAI's batches show them."""
        return {
            "input_tokens": self.input,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }


@dataclass
class _Side:
    """One of the two files."""

    path: Path
    count: int = 0
    size: int = 0
    handle: int | None = None
    dirty: bool = False


class Journal:
    """The answers in ``folder``. Close it at the end.

    Opening it and ``sync`` block, for threads; ``add`` takes no time, and nothing comes in between on the event loop.

    Opening it raises :class:`LeaseLostError` while another process has it open.
    """

    def __init__(self, folder: Path) -> None:
        self.done: set[str] = set()
        self.tokens = Tokens()
        self._sides: dict[Kind, _Side] = {kind: _Side(folder / f"{kind}.jsonl") for kind in ("output", "errors")}
        self._stack = ExitStack()
        busy = LeaseLostError("Another process is at work on this batch.")
        with explained():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The lease says who shall work on it; this keeps out one that was merely slow.
            self._stack.enter_context(locked(folder / "lock", busy=busy))
        try:
            for side in self._sides.values():
                self._recover(side)
        except BaseException:
            self.close()
            raise

    @property
    def counts(self) -> tuple[int, int]:
        """How many lines were answered, and how many failed."""
        return self._sides["output"].count, self._sides["errors"].count

    def path(self, kind: Kind) -> Path | None:
        """The file of answers or of errors; None if there are none."""
        side = self._sides[kind]
        return side.path if side.count else None

    def add(self, kind: Kind, custom_id: str, line: str, usage: Any = None) -> None:
        """Add the line of one answer. Raises :class:`NoSpaceError`, and the journal is as before then."""
        content = f"{line}\n".encode()
        side = self._sides[kind]
        with explained():
            if side.handle is None:
                side.handle = os.open(side.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(side.handle, rest) :]
            except OSError:
                os.ftruncate(side.handle, side.size)
                raise
        side.size += len(content)
        side.count += 1
        side.dirty = True
        self.done.add(custom_id)
        self.tokens.add(usage)

    def sync(self) -> None:
        """Make sure that what was added survives a power cut."""
        for side in self._sides.values():
            if side.dirty and side.handle is not None:
                side.dirty = False
                with explained():
                    os.fsync(side.handle)

    def close(self) -> None:
        """Let another have it."""
        for side in self._sides.values():
            if side.handle is not None:
                os.close(side.handle)
                side.handle = None
        self._stack.close()

    def _recover(self, side: _Side) -> None:
        if not side.path.exists():
            return
        with side.path.open("r+b") as file:
            for content in file:
                try:
                    line = json.loads(content) if content.endswith(b"\n") else None
                except ValueError:
                    line = None
                if line is None:  # the end of what was written when the process was killed
                    break
                side.size += len(content)
                side.count += 1
                self.done.add(line["custom_id"])
                self.tokens.add(((line["response"] or {}).get("body") or {}).get("usage"))
            file.truncate(side.size)
