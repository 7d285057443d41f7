"""JSON as our answers carry it: one line, as short as it gets, characters as they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from fastapi.responses import Response

# Items that are written in one go. Python's writer lets nothing else run meanwhile, in whatever thread it is.
_AT_ONCE = 64
# How deep the long lists of an answer lie: answer, choices, choice, logprobs, list.
_DEPTH = 5


def to_json(value: Any) -> str:
    """``value`` on one line. Raises ``ValueError`` for NaN and infinity, which JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def to_json_aside(value: Any) -> bytes:
    """As :func:`to_json`, for what may have millions of items: everybody's streams go on meanwhile."""
    return await asyncio.to_thread(lambda: b"".join(piece.encode() for piece in _pieces(value, _DEPTH)))


async def json_response(value: Any, *, long: bool) -> Response:
    """An answer, which may have millions of items where it is ``long``."""
    return Response(await to_json_aside(value) if long else to_json(value), media_type="application/json")


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """The text of :func:`to_json`; long lists are looked for ``depth`` levels deep."""
    if isinstance(value, dict) and value and depth:
        for place, (name, item) in enumerate(value.items()):
            yield f"{',' if place else '{'}{to_json(name)}:"
            yield from _pieces(item, depth - 1)
        yield "}"
    elif isinstance(value, list) and len(value) > _AT_ONCE and depth == 1:
        for low in range(0, len(value), _AT_ONCE):
            yield ("," if low else "[") + to_json(value[low : low + _AT_ONCE])[1:-1]
        yield "]"
    elif isinstance(value, list) and value and depth > 1:
        for place, item in enumerate(value):
            yield "," if place else "["
            yield from _pieces(item, depth - 1)
        yield "]"
    else:
        yield to_json(value)
