"""Who a request comes from, found once at the edge and read by every route."""

from __future__ import annotations

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gale.platform.access import LOCAL_OWNER, Actor


class Identify:
    """ASGI middleware that puts the :class:`Actor` of a request into its state."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Identify the caller of one request."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["actor"] = LOCAL_OWNER
        await self._app(scope, receive, send)


def actor_of(request: Request) -> Actor:
    """Whom ``request`` acts for."""
    actor: Actor = request.state.actor
    return actor
