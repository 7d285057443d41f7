"""Server-sent events (WHATWG HTML, section 9.2): the one writer that both of our APIs stream through.

A producer task runs the whole event iterator and fills a short queue; the writer empties it. So a client that reads
slowly delays nobody but itself, and a client that leaves ends the iterator wherever it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gale.server.disconnect import cancel, client_gone
from gale.server.errors import ApiError, as_api_error
from gale.server.json_text import to_json
from gale.server.lifecycle import Lifecycle

log = structlog.get_logger("gale.server.sse")

KEEP_ALIVE = b": keep-alive\n\n"
# A stream's lines end with CR or LF only, but many clients' line readers end them at these as well.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: ``data``, which is JSON and so without line breaks, and a name where the protocol wants one."""

    data: str
    name: str | None = None

    def encode(self) -> bytes:
        """The event as bytes of the stream."""
        name = f"event: {self.name}\n" if self.name else ""
        return f"{name}data: {self.data.translate(_LINE_ENDS)}\n\n".encode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """When a stream is kept alive and when it is given up, in seconds; and how many events may wait."""

    keep_alive_s: float = 15.0
    send_timeout_s: float = 30.0
    queue_events: int = 256


class _ClientStuckError(Exception):
    """The client keeps the connection and takes nothing from it."""


class _End:
    """The last item of the queue: nothing, or why the stream failed."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure


class EventStream(Response):
    """A response that streams ``events``.

    What the iterator raises before its first event becomes an ordinary error response with its own status. What it
    raises later becomes a last event, named ``error_name``, with ``error_body`` as its data. A first event that takes
    longer than the keep-alive time (a long prompt) starts the stream without it. The iterator is closed in every case
    before this returns.
    """

    def __init__(
        self,
        events: AsyncGenerator[ServerSentEvent, None],
        lifecycle: Lifecycle,
        *,
        error_name: str | None = None,
        error_body: Callable[[ApiError], dict[str, Any]] = lambda error: error.body,
        limits: StreamLimits | None = None,
    ) -> None:
        # Proxies such as nginx would otherwise collect the answer and deliver it in one piece.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._lifecycle = lifecycle
        self._error_name = error_name
        self._error_body = error_body
        self._limits = limits or StreamLimits()
        self._queue: asyncio.Queue[ServerSentEvent | _End] = asyncio.Queue(self._limits.queue_events)
        self._stopping = False
        self._abandoned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends, the client leaves or stops reading, or the server stops."""
        producing = asyncio.create_task(self._produce())
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(client_gone(receive))
        stopping = asyncio.create_task(self._lifecycle.grace_over())
        try:
            await asyncio.wait((writing, leaving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not writing.done():
                self._stopping = True
                producing.cancel()
                await asyncio.wait((writing, leaving), timeout=1, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            else:
                log.info("stream abandoned", reason="client disconnected" if leaving.done() else "server stops")
        except _ClientStuckError:
            log.info("stream abandoned", reason="client does not read")
        finally:
            self._abandoned = True
            await cancel(producing, writing, leaving, stopping)

    async def _produce(self) -> None:
        end = _End()
        try:
            async for event in self._events:
                await self._queue.put(event)
        except asyncio.CancelledError:
            # Only we cancel: because nobody listens any more, or to say goodbye.
            if self._stopping:
                end = _End(ApiError(503, "The server is shutting down.", code="server_shutting_down"))
        except Exception as error:
            end = _End(error)
        try:
            await self._events.aclose()
        except Exception as error:
            end = _End(error)
        if not self._abandoned:
            await self._queue.put(end)
        elif end.failure is not None:
            # Nobody is left to be told; an answer that could not be stored must not go unnoticed all the same.
            log.error("stream failed after its client had left", exc_info=end.failure)

    async def _write(self, send: Send) -> None:
        started = False
        while True:
            try:
                async with asyncio.timeout(self._limits.keep_alive_s):
                    item = await self._queue.get()
            except TimeoutError:
                await self._send(send, KEEP_ALIVE, start=not started)
                started = True
                continue
            if isinstance(item, _End) and item.failure is not None and not started:
                raise item.failure
            chunks, end = self._collect(item)
            await self._send(send, b"".join(chunks), start=not started, more=end is None)
            started = True
            if end is not None:
                return

    def _collect(self, item: ServerSentEvent | _End) -> tuple[list[bytes], _End | None]:
        """``item`` and whatever else is ready, to be sent as one piece."""
        chunks: list[bytes] = []
        while not isinstance(item, _End):
            chunks.append(item.encode())
            if self._queue.empty():
                return chunks, None
            item = self._queue.get_nowait()
        if item.failure is not None:
            error = as_api_error(item.failure)
            if error.status == 500:
                log.error("stream failed", exc_info=item.failure)
            chunks.append(ServerSentEvent(to_json(self._error_body(error)), self._error_name).encode())
        return chunks, item

    async def _send(self, send: Send, chunk: bytes, *, start: bool, more: bool = True) -> None:
        message: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                if start:
                    await send(message)
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError as error:
            raise _ClientStuckError from error
