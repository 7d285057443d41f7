"""CORS (WHATWG Fetch, section 3.2): pages of other sites that may use the API, with a key and never with a cookie."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gale.server.origins import Origins

_METHODS = "GET, POST, PATCH, DELETE, OPTIONS"
_EXPOSED = ", ".join(
    (
        "x-request-id",
        "retry-after",
        *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
    )
)


class Cors:
    """ASGI middleware that tells browsers which origins may read answers; without any it does nothing."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight of an allowed page, and mark other answers to it."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin", "")
        if origin.lower() not in self._origins.allowed:
            await self._app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            # What a page asks to send is listed back, as clients have headers of their own; none gives a right.
            response = Response(
                status_code=204,
                headers={
                    "access-control-allow-methods": _METHODS,
                    "access-control-allow-headers": headers.get("access-control-request-headers", "authorization"),
                    "access-control-max-age": "600",
                },
            )
            await response(scope, receive, _marking(send, origin))
            return
        await self._app(scope, receive, _marking(send, origin))


def _marking(send: Send, origin: str) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = _EXPOSED
            headers.add_vary_header("origin")
        await send(message)

    return marked
