"""Lists in OpenAI's shape, which its clients turn page by page."""

from __future__ import annotations

from typing import Any


def list_object(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """One page; the next begins ``after`` its ``last_id``."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
