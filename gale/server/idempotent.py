"""``Idempotency-Key``: a request that is sent again gets the answer that it already had.

For POSTs below ``/v1`` with a JSON body that do not stream. A client that gives a key has said that it will ask again,
so its request is answered to the end even if it leaves; asking again meanwhile gets 409 with ``Retry-After``, which
OpenAI's clients obey, and afterwards the same answer, paid for once. Only answers of success are kept: what failed may
be tried again. A key belongs to a project, and a request to whoever asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gale.core.errors import GaleError
from gale.platform.access import Actor
from gale.platform.idempotency import IN_PROGRESS_S, Earlier, Idempotency
from gale.server.disconnect import cancel
from gale.server.errors import ApiError, as_api_error

MOST_KEPT_BYTES = 4 * 1024 * 1024
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_STREAM = re.compile(rb'"stream"\s*:\s*true')
log = structlog.get_logger("gale.server")


class Idempotent:
    """ASGI middleware, inside of the one that identifies the caller."""

    def __init__(self, app: ASGIApp, kept: Idempotency) -> None:
        self._app = app
        self._kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer it as before."""
        # What administration answers may hold a new key, which is shown once and kept nowhere.
        path = scope.get("path", "")
        kept = path.startswith("/v1/") and not path.startswith("/v1/organization")
        if scope["type"] != "http" or scope["method"] != "POST" or not kept:
            await self._app(scope, receive, send)
            return
        keys = Headers(scope=scope).getlist("idempotency-key")
        if not keys:
            await self._app(scope, receive, send)
            return
        try:
            _check(scope, keys)
            body = await _whole(receive)
            if _STREAM.search(body) and _streams(body):
                await self._app(scope, _replayed(body, receive), send)
                return
            await self._serve(scope, receive, send, keys[0], body)
        except (ApiError, GaleError) as error:
            await as_api_error(error).response(scope["path"])(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, key: str, body: bytes) -> None:
        actor: Actor = scope["state"]["actor"]
        digest = _digest(scope, actor, body)
        earlier = await self._kept.begin(actor.project, key, digest)
        if earlier is not None:
            await _again(scope, send, earlier, digest)
            return
        answer = _Answer()
        prolonging = asyncio.create_task(self._prolong(actor.project, key))
        try:
            await self._app(scope, _replayed(body, _never), answer.take)
        except BaseException:
            await cancel(prolonging)
            await self._kept.abandon(actor.project, key)
            raise
        await cancel(prolonging)
        if answer.succeeded:
            await self._kept.finish(actor.project, key, answer.status, answer.text())
        else:
            await self._kept.abandon(actor.project, key)
        for message in answer.messages:
            await send(message)

    async def _prolong(self, project_id: str, key: str) -> None:
        while True:
            await asyncio.sleep(IN_PROGRESS_S / 3)
            try:
                await self._kept.prolong(project_id, key)
            except GaleError as error:
                log.warning("an idempotency key could not be kept", reason=error.message)


class _Answer:
    """Gathers what the application sends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.status = 0
        self._is_json = False

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_json = Headers(raw=message["headers"]).get("content-type", "") == "application/json"
        self.messages.append(message)

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 300 and self._is_json

    def text(self) -> str | None:
        """The body; None if it is too long to keep."""
        pieces = [message.get("body", b"") for message in self.messages]
        return b"".join(pieces).decode() if sum(map(len, pieces)) <= MOST_KEPT_BYTES else None


def _check(scope: Scope, keys: list[str]) -> None:
    """Raises :class:`ApiError` for what cannot have a key."""
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise _invalid("it must be one text of 1 to 255 visible ASCII characters")
    if Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() not in ("", "application/json"):
        # A form that is sent again is written anew, with another boundary: it could never be recognised.
        raise _invalid("only requests in JSON can have one")
    if scope["state"]["actor"].project_id is None:
        raise _invalid("requests with an administration key cannot have one")


async def _again(scope: Scope, send: Send, earlier: Earlier, digest: str) -> None:
    """Answer as before. Raises :class:`ApiError` where that cannot be."""
    if earlier.request_sha256 != digest:
        raise ApiError(
            400,
            "This Idempotency-Key was given to another request; give each its own.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    if earlier.status is None:
        raise ApiError(
            409,
            "The request with this Idempotency-Key is still being answered.",
            code="idempotency_in_progress",
            headers={"Retry-After": "1"},
        )
    if earlier.response is None:
        raise ApiError(
            409,
            "The request with this Idempotency-Key was answered, and its answer was too long to be kept.",
            code="idempotency_not_kept",
            headers={"x-should-retry": "false"},
        )
    body = earlier.response.encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"idempotency-replayed", b"true"),
    ]
    await send({"type": "http.response.start", "status": earlier.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _digest(scope: Scope, actor: Actor, body: bytes) -> str:
    asked = hashlib.sha256()
    for piece in (scope["raw_path"], scope["query_string"], (actor.key_id or actor.user_id or "").encode()):
        asked.update(piece + b"\0")
    asked.update(body)
    return asked.hexdigest()


async def _whole(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ApiError(400, "The client left before its request was complete.", code="client_disconnected")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _streams(body: bytes) -> bool:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and parsed.get("stream") is True


def _replayed(body: bytes, then: Receive) -> Callable[[], Awaitable[Message]]:
    """``receive`` for a body that was read before."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else await then()

    return receive


async def _never() -> Message:
    """The client does not leave."""
    await asyncio.Event().wait()
    raise AssertionError


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"Invalid Idempotency-Key: {reason}.", code="invalid_value", param="Idempotency-Key")
