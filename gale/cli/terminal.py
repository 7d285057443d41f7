"""What a person types on a terminal, read with what was pasted."""

from __future__ import annotations

import contextlib
import select
import sys

# What a terminal needs to hand over the rest of something pasted, in seconds.
_PASTE_PAUSE = 0.05


def read_message(prompt: str) -> str:
    """One message from standard input; lines pasted together are one message. Raises EOFError at the end."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it gives input() history and arrow keys)
    lines = [input(prompt)]
    while select.select([sys.stdin], [], [], _PASTE_PAUSE)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)
