"""Text on its way into the store: what every database accepts, and titles made from messages."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

TITLE_LENGTH = 60
_REFUSED = re.compile("[\x00\ud800-\udfff]")
_JOINERS = frozenset("\u200d\ufe0e\ufe0f")  # zero-width joiner and variation selectors, which glue emoji together
_SKIN_TONES = range(0x1F3FB, 0x1F400)


def storable(text: str) -> str:
    """``text`` with NUL and lone surrogates replaced by U+FFFD.

    SQLite would take a NUL and PostgreSQL refuses it; a lone surrogate cannot be encoded as UTF-8 at all. Both are
    replaced here so that a database is never the first to notice.
    """
    return _REFUSED.sub("\ufffd", text)


def json_text(value: Any) -> str:
    """``value`` as JSON. Raises ``ValueError`` for NaN and infinity, which SQLite would take and PostgreSQL refuses.

    NUL and lone surrogates stay what they are: they are written as escapes.
    """
    return json.dumps(value, allow_nan=False)


def one_line(text: str) -> str:
    """``text`` as a name: storable, and every run of white space one space."""
    return " ".join(storable(text).split())


def title_from(text: str, length: int = TITLE_LENGTH) -> str:
    """``text`` on one line, cut to at most ``length`` characters plus an ellipsis.

    The cut falls between words where the text has spaces. Chinese and Japanese have none, and a single long word
    (a URL) would leave nothing, so otherwise it falls between characters, never inside a composed one.
    """
    line = one_line(text)
    if len(line) <= length:
        return line
    end = length
    while end > 0 and _continues(line, end):
        end -= 1
    space = line.rfind(" ", length // 2, end + 1)
    return line[: space if space > 0 else end or length].rstrip() + "…"


def _continues(line: str, position: int) -> bool:
    """Whether the character at ``position`` belongs to the one before it."""
    character = line[position]
    return (
        character in _JOINERS
        or line[position - 1] == "\u200d"
        or ord(character) in _SKIN_TONES
        or unicodedata.combining(character) != 0
    )
