"""Signing in to the chat page and out of it: a link that works once becomes a cookie that scripts cannot read."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from gale.platform.identities import Identities
from gale.platform.sessions import SESSION_S
from gale.platform.store import Store
from gale.server.caller import COOKIE, SIGN_IN, actor_of, session_token
from gale.server.errors import ApiError
from gale.server.json_body import read_json, request_schema
from gale.server.origins import Origins

# Failures are written to the audit log, which must not be a way to fill the disk.
_FAILURES_A_MINUTE = 10


class SignIn(BaseModel):
    """What the page found in the address it was opened with."""

    model_config = ConfigDict(strict=True, extra="ignore")

    token: Annotated[str, Field(min_length=1, max_length=200)]


def routes(store: Store, identities: Identities, origins: Origins) -> APIRouter:
    """``POST /api/sign-in`` and ``POST /api/sign-out``."""
    router = APIRouter(tags=["chat page"])
    failures = _Budget(_FAILURES_A_MINUTE)

    @router.post(SIGN_IN, status_code=204, openapi_extra=request_schema(SignIn))
    async def sign_in(request: Request) -> Response:
        body = await read_json(request, SignIn)
        address = request.client.host if request.client else None
        session = await store.sessions.sign_in(body.token, address)
        if session is None:
            if failures.spend():
                await store.sessions.note_failure(address)
            raise ApiError(
                401,
                "This sign-in link does not work: it was used before, or it is older than a day.",
                code="invalid_sign_in",
            )
        identities.forget()
        response = Response(status_code=204)
        response.set_cookie(
            COOKIE, session, max_age=SESSION_S, path="/api", secure=origins.secure, httponly=True, samesite="strict"
        )
        return response

    @router.post("/api/sign-out", status_code=204)
    async def sign_out(request: Request) -> Response:
        if (token := session_token(request.headers)) is not None:
            await store.sessions.sign_out(actor_of(request), token)
            identities.forget()
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, path="/api", secure=origins.secure, httponly=True, samesite="strict")
        return response

    return router


def sign_in_url(base: str, token: str) -> str:
    """What to open in a browser. The token stands behind a #, which browsers send to no server and no log."""
    return f"{base.rstrip('/')}/#sign-in={token}"


class _Budget:
    """So many a minute."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._minute = 0
        self._left = 0

    def spend(self) -> bool:
        """Whether one more is within it."""
        if (minute := int(time.monotonic() // 60)) != self._minute:
            self._minute, self._left = minute, self._a_minute
        self._left -= 1
        return self._left >= 0
