"""Lists as OpenAI pages through them: ``limit`` things after the one named ``after``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Query

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=200)]
Order = Annotated[Literal["asc", "desc"], Query()]


def listed(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """The list object around one page of objects, each of which has an ``id``."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(data), **ends, "has_more": has_more}
