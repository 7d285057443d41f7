"""How large a request body may be and how slowly it may come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Send

from gale.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """A body has ``patience_s`` seconds, and one more for each ``bytes_per_s`` that arrived."""

    size: int = 8 * 1024 * 1024
    patience_s: float = 10.0
    bytes_per_s: int = 16 * 1024
    linger_bytes: int = 64 * 1024 * 1024
    linger_s: float = 5.0


class LimitedBody:
    """Wraps one request's ``receive`` and ``send``."""

    def __init__(self, receive: Receive, send: Send, limit: BodyLimit) -> None:
        self._receive = receive
        self._send = send
        self._limit = limit
        self._received = 0
        self._complete = False
        self._expected = False
        self._began = time.monotonic()

    def check_length(self, headers: Headers) -> None:
        """Refuse a body that is declared too large before reading any of it. Raises :class:`ApiError` 413 or 400."""
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "The header Content-Length is not a number.", code="invalid_request")
        # Whoever asks first whether to send the body (RFC 9110, section 10.1.1) sends none after a refusal.
        self._expected = (length != "0" or "transfer-encoding" in headers) and "expect" not in headers
        if len(length) > 19 or int(length) > self._limit.size:
            raise self._refusal()

    async def receive(self) -> Message:
        """The next part of the body. Raises :class:`ApiError` 413 or 408."""
        if self._complete:
            return await self._receive()
        allowed = self._limit.patience_s + self._received / self._limit.bytes_per_s
        try:
            async with asyncio.timeout(allowed - (time.monotonic() - self._began)):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(
                408, "The request body came too slowly.", code="request_timeout", headers={"connection": "close"}
            ) from error
        if message["type"] != "http.request":
            return message
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self._limit.size:
            raise self._refusal()
        return message

    async def send(self, message: Message) -> None:
        """Pass a message on. An answer that does not wait for the whole body ends the connection; before its end, what
        the client is still sending is taken."""
        ended = self._complete or not self._expected
        if message["type"] == "http.response.start" and not ended:
            MutableHeaders(scope=message)["connection"] = "close"
        if message["type"] == "http.response.body" and not message.get("more_body", False) and not ended:
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _linger(self) -> None:
        # A connection closed with bytes unread is reset, and a reset makes the client throw away our answer.
        left = self._limit.linger_bytes
        try:
            async with asyncio.timeout(self._limit.linger_s):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _refusal(self) -> ApiError:
        megabytes = self._limit.size // (1024 * 1024)
        return ApiError(
            413,
            f"The request body is larger than {megabytes} MiB.",
            code="request_too_large",
            headers={"connection": "close"},
        )
