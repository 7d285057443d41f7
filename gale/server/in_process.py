"""Requests that Gale makes of its own routes: no socket, and otherwise what a client's request is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from gale.server.errors import internal_error

log = structlog.get_logger("gale.server")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Headers
    content: bytes


class InProcess:
    """Posts to ``app``. Cancelling the call is as good as a client that leaves."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def post(self, path: str, body: bytes, state: dict[str, Any]) -> Answer:
        """Post JSON; ``state`` is what the layers before the routes would have found out, the actor above all."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
            "client": None,
            "server": None,
            "state": dict(state),
        }
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        start: Message = {}
        content = bytearray()

        async def receive() -> Message:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            content.extend(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        except Exception:
            log.exception("request failed", path=path)
            response = internal_error().response()
            return Answer(response.status_code, Headers(raw=response.raw_headers), bytes(response.body))
        return Answer(start["status"], Headers(raw=start["headers"]), bytes(content))
