"""Lists as OpenAI pages through them: ``limit`` things after the one named ``after``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Query

from gale.platform.errors import CursorError

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=200)]
Order = Annotated[Literal["asc", "desc"], Query()]


def listed(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """The list object around one page of objects, each of which has an ``id``."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(data), **ends, "has_more": has_more}


def page_of(things: Sequence[dict[str, Any]], *, limit: int, after: str | None, order: str) -> dict[str, Any]:
    """A page of ``things``, oldest first. Raises :class:`CursorError` where ``after`` is none of them."""
    ordered = things if order == "asc" else things[::-1]
    begin = 0
    if after is not None:
        begin = next((place + 1 for place, thing in enumerate(ordered) if thing["id"] == after), -1)
        if begin < 0:
            raise CursorError(f"'{after[:100]}' is not in this list.", param="after")
    return listed(ordered[begin : begin + limit], has_more=len(ordered) > begin + limit)
