"""Who a request comes from, found once at the edge and read by every route.

Without accounts (see ``has_accounts``), whoever sits at this machine is its owner, under the rules of ``local_guard``.
With accounts nothing is served to strangers but what :func:`is_open` names: a key goes in a header, and the chat page
has a cookie that no other site's page can use.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Collection
from http.cookies import CookieError, SimpleCookie
from typing import TypeVar

import structlog
from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gale.core.errors import StoreError
from gale.engine.request import Engine
from gale.platform.access import LOCAL_OWNER, Actor, NotAllowedError, authorize
from gale.platform.admission import Ticket
from gale.platform.identities import Identities
from gale.server import local_guard
from gale.server.errors import AccessEndedError, ApiError, as_api_error
from gale.server.json_text import to_json
from gale.server.metered import engine_for, ticket_for
from gale.server.origins import Origins

AnyEngine = TypeVar("AnyEngine", bound=Engine)

log = structlog.get_logger("gale.server.caller")

COOKIE = "gale_session"
SIGN_IN = "/api/sign-in"
_HEALTH = frozenset(("/healthz", "/readyz"))
_METRICS = "/metrics"
_PAGE = re.compile(r"/|/c/[^/]+|/assets/.+")
_RECHECK_S = 1.0


class Identify:
    """ASGI middleware that puts the :class:`Actor` of a request into its state, or answers 401.

    What goes on being answered is checked again and again: nothing more is sent for a key that was revoked.
    """

    def __init__(
        self, app: ASGIApp, identities: Identities, origins: Origins, page_files: Collection[str] = ()
    ) -> None:
        self._app = app
        self._identities = identities
        self._origins = origins
        self._page_files = frozenset(page_files)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Identify the caller of one request and serve it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            if await self._identities.accounts_exist():
                find = self._finder(scope)
                if find is not None:
                    state["actor"] = actor = await _found(find)
                    if scope["path"].startswith(local_guard.ADMINISTRATION):
                        # Here as well as in the store, so that nothing of a request is looked at before.
                        authorize(actor, "administer")
                    send = _Checked(send, find, scope["path"]).send
            else:
                local_guard.check(scope, self._origins)
                state["actor"] = LOCAL_OWNER
        except (ApiError, NotAllowedError, StoreError) as error:
            # Neither let in nor turned away where it cannot be known: a StoreError is a 503.
            await as_api_error(error).response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _finder(self, scope: Scope) -> Finder | None:
        """How to find whom the request stands for, or None where that is nobody's matter. Raises :class:`ApiError`."""
        headers = Headers(scope=scope)
        if self._is_open(scope):
            if scope["path"] == SIGN_IN:
                self._origins.check(scope, headers)
            return None
        keys = presented_keys(headers)
        if len(keys) > 1:
            raise unauthorised("This request has two different API keys.")
        if keys:
            (key,) = keys
            return lambda: self._identities.of_key(key)
        token = session_token(headers) if scope["path"].startswith("/api/") else None
        if token is None:
            raise unauthorised("This Gale needs an API key: send it as 'Authorization: Bearer sk-gale-...'.")
        # What a browser sends by itself is believed from our own page only.
        self._origins.check(scope, headers)
        return lambda: self._identities.of_session(token)

    def _is_open(self, scope: Scope) -> bool:
        path, method = scope["path"], scope["method"]
        if method == "POST":
            return bool(path == SIGN_IN)
        return method in ("GET", "HEAD") and (
            path in _HEALTH
            or (path == _METRICS and local_guard.asks_from_here(scope))
            or path in self._page_files
            or _PAGE.fullmatch(path) is not None
        )


Finder = Callable[[], Awaitable[Actor | None]]


class _Checked:
    """What is sent to somebody who may lose the right to it meanwhile."""

    def __init__(self, send: Send, find: Finder, path: str) -> None:
        self._path = path
        self._send = send
        self._find = find
        self._checked_at = time.monotonic()
        self._began = self._streams = False

    async def send(self, message: Message) -> None:
        """Pass a message on. Raises :class:`ApiError` or :class:`AccessEndedError` once the key or session is over."""
        now = time.monotonic()
        if now - self._checked_at >= _RECHECK_S:
            self._checked_at = now
            try:
                await _found(self._find)
            except StoreError:
                # Begun with a good key; that it was revoked could not have been written down either.
                log.warning("a caller could not be looked up again")
            except ApiError as error:
                if not self._began:
                    raise
                if self._streams:
                    event = f"event: error\ndata: {to_json(error.body_for(self._path))}\n\n".encode()
                    await self._send({"type": "http.response.body", "body": event})
                raise AccessEndedError from error
        if message["type"] == "http.response.start":
            self._began = True
            self._streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        await self._send(message)


def actor_of(request: Request) -> Actor:
    """Whom ``request`` acts for."""
    actor: Actor = request.state.actor
    return actor


def engine_of(request: Request, engine: AnyEngine) -> AnyEngine:
    """``engine`` as whom ``request`` acts for may use it: limited, charged and counted (see gale.platform.metering)."""
    return engine_for(request, actor_of(request), engine)


async def ask_for(request: Request, model: str, kind: str, most: int) -> Ticket:
    """Let ``request`` use ``most`` tokens of a model that is no engine; raises and is ended as :class:`Ticket` says."""
    return await ticket_for(request, actor_of(request), model, kind, most)


def is_signed_in(request: Request) -> bool:
    """Whether a browser's session made the request, so that there is something to sign out of."""
    actor = actor_of(request)
    return actor.key_id is None and actor is not LOCAL_OWNER


def presented_keys(headers: Headers) -> set[str]:
    """The keys of a request, wherever it has them: the one place where a key is looked for."""
    keys = {value.strip() for name in ("x-api-key", "api-key") for value in headers.getlist(name)}
    for value in headers.getlist("authorization"):
        scheme, _, key = value.strip().partition(" ")
        # Of another scheme it is a wrong key, and not none: whoever sends one wants to be told.
        keys.add(key.strip() if scheme.lower() == "bearer" else "")
    return keys


def session_token(headers: Headers) -> str | None:
    """What the session cookie holds."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        for value in headers.getlist("cookie"):
            cookies.load(value)
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


def unauthorised(message: str = "This API key or sign-in is not valid here.") -> ApiError:
    """The one answer to everybody who is not known."""
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _found(find: Finder) -> Actor:
    actor = await find()
    if actor is None:
        raise unauthorised()
    return actor
