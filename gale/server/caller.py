"""Who a request comes from, found once at the edge and read by every route."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gale.engine.request import Engine
from gale.platform.access import LOCAL_OWNER, Actor
from gale.server.metered import engine_for

AnyEngine = TypeVar("AnyEngine", bound=Engine)


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


def engine_of(request: Request, engine: AnyEngine) -> AnyEngine:
    """``engine`` as whom ``request`` acts for may use it: limited, charged and counted (see gale.platform.metering)."""
    return engine_for(request, actor_of(request), engine)
