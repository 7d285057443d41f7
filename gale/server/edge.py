"""The outermost layer, which every request passes: identity, limits, headers, the log line and the last safety net.

Pure ASGI. A request's body is bounded in size and in time while it is read, never after.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field, replace

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gale.server import errors
from gale.server.body_limit import BodyLimit, LimitedBody
from gale.server.errors import AccessEndedError, ApiError, internal_error
from gale.server.lifecycle import Lifecycle

log = structlog.get_logger("gale.server")

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FILES = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
_HEALTH = ("/healthz", "/readyz")
_CLOSE = {"connection": "close"}


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What one request may weigh, and how many may be in progress.

    ``file_body_bytes`` are for forms that bring a file, which goes to the disk as it comes.
    """

    target_bytes: int = 8 * 1024
    header_bytes: int = 32 * 1024
    header_count: int = 100
    requests: int = 512
    body: BodyLimit = field(default_factory=BodyLimit)
    file_body_bytes: int = 513 * 1024 * 1024

    def body_of(self, scope: Scope) -> BodyLimit:
        """The limits for the body of one request."""
        if scope["method"] == "POST" and _FILES.fullmatch(scope["path"]):
            return replace(self.body, size=self.file_body_bytes)
        return self.body


class Edge:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, limits: EdgeLimits) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._limits = limits
        self._in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event; whatever happens inside, the client gets an answer and the log a line."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(scope, _request_id(headers), send)
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        errors.request_id.set(exchange.request_id)
        body = LimitedBody(receive, exchange.send, self._limits.body_of(scope))
        self._in_progress += 1
        try:
            self._check(scope, headers)
            body.check_length(headers)
            await self._app(scope, body.receive, body.send)
        except AccessEndedError:
            log.info("answer cut short", reason="access ended", request_id=exchange.request_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request failed", request_id=exchange.request_id)
                error = internal_error()
            # Once begun, a response is left without its end and the connection closed, so that the client can tell.
            if exchange.status is None:
                await error.response(scope["path"])(scope, receive, body.send)
        finally:
            self._in_progress -= 1
            exchange.log_line()

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse what no handler needs to see. Raises :class:`ApiError`."""
        if scope["path"] not in _HEALTH:
            if self._lifecycle.draining:
                raise _unavailable("The server is shutting down.", "server_shutting_down")
            if self._in_progress > self._limits.requests:
                raise _unavailable("Too many requests are in progress.", "server_overloaded")
        if len(scope["raw_path"]) + len(scope["query_string"]) > self._limits.target_bytes:
            raise ApiError(414, "The request's URL is too long.", code="url_too_long", headers=_CLOSE)
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._limits.header_bytes or len(scope["headers"]) > self._limits.header_count:
            raise ApiError(431, "The request's headers are too large.", code="headers_too_large", headers=_CLOSE)
        if "content-length" in headers and "transfer-encoding" in headers:
            # Two programs in a row may disagree where such a request ends (request smuggling, RFC 9112 section 6.1).
            raise ApiError(
                400,
                "A request must not have both Content-Length and Transfer-Encoding.",
                code="invalid_request",
                headers=_CLOSE,
            )
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise ApiError(415, "Compressed request bodies are not accepted.", code="unsupported_media_type")


class _Exchange:
    """One request and its response, as the log sees them."""

    def __init__(self, scope: Scope, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._began = time.perf_counter()

    async def send(self, message: Message) -> None:
        """Pass a message on, with our headers on the first."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["content-security-policy"] = CONTENT_SECURITY_POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            headers["cross-origin-resource-policy"] = "same-origin"
            # Answers are private and change; only files whose names change with their content say otherwise.
            headers.setdefault("cache-control", "no-store")
        await self._send(message)

    def log_line(self) -> None:
        """One line without query, body or key. The path stays percent-encoded, so it cannot forge a line."""
        write = log.debug if self._scope["path"] in _HEALTH else log.info
        write(
            "request",
            method=self._scope["method"],
            path=self._scope["raw_path"].decode("ascii", "backslashreplace"),
            status=self.status,
            ms=round((time.perf_counter() - self._began) * 1000, 1),
            request_id=self.request_id,
        )


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": "2"})
