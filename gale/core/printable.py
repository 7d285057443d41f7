"""Text from anywhere, fit to be shown: without what would command the terminal that shows it."""

from __future__ import annotations

import unicodedata

# Explicit directions can make text read as other than it is (Trojan Source, Boucher & Anderson 2021).
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """``text`` without control characters, so that nobody whose text is shown can write escape sequences.

    Nor half characters, which no output can write.
    """
    if text.isprintable():  # most is
        return text
    return "".join(
        c for c in text if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _DIRECTIONS)
    )
