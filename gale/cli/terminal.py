"""Text from models and people on a terminal: shown without what would command it, read with what was pasted."""

from __future__ import annotations

import contextlib
import select
import sys
import unicodedata

# Explicit directions can make text read as other than it is (Trojan Source, Boucher & Anderson 2021).
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# What a terminal needs to hand over the rest of something pasted, in seconds.
_PASTE_PAUSE = 0.05


def printable(text: str) -> str:
    """``text`` without control characters, so that no model can write escape sequences to a terminal.

    Nor half characters, which no output can write.
    """
    return "".join(
        c for c in text if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _DIRECTIONS)
    )


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
