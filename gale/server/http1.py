"""HTTP/1.1 with patience that ends: what uvicorn leaves open for ever is closed here.

uvicorn has a time-out for idle connections only. A client that sends half a header, or takes nothing of what it
asked for, would keep its connection (and the file descriptor) until it pleased to go.
"""

from __future__ import annotations

import asyncio
import http
import re
import resource
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gale.server.errors import ApiError

HEAD_TIMEOUT_S = 10.0
# Longer than the stream writer's own time-out, which ends politely.
STUCK_TIMEOUT_S = 45.0
# Larger heads are cut off while they arrive; smaller ones that are still too large get the edge's 431.
MOST_HEAD_BYTES = 64 * 1024

# A peer from which nothing comes back for so long, not even the confirmation of what it was sent, is gone: its cable
# was pulled, or a router forgot it.
LOST_TIMEOUT_S = 45
_PROBE_AFTER_S = 15
# Beyond these the one that has been idle longest makes room: an idle connection costs a client nothing.
MOST_CONNECTIONS = 4096

_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")


class Http1(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._time_head()
        _notice_loss(transport.get_extra_info("socket"))
        if len(self.connections) > _most_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers, which would otherwise keep this object alive."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stuck_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Check the head's line ends, which h11 is lenient about, and pass it on."""
        if self.conn.their_state is h11.IDLE:
            head, _, _ = (self.conn.trailing_data[0] + data).partition(b"\r\n\r\n")
            if _BARE_LINE_FEED.search(head):
                # A proxy before us may take another view of where such a header ends.
                self._refuse(400, "Lines must end with CR LF.")
                return
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        """End the connection where a second request came before the first was answered.

        No client we know of does that (pipelining), and the heads of such requests would escape the check above.
        """
        if self.conn.trailing_data[0]:
            self.transport.close()
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client is not reading: cut it off if it does not begin to."""
        super().pause_writing()
        self._stuck_timer = self.loop.call_later(STUCK_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP: answer with our error body instead of plain text."""
        error = sys.exception()
        self._refuse(error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400, msg)

    def _time_head(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408, "The request came too slowly.")
        elif not waiting and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _make_room(self) -> None:
        idle = [
            each
            for each in self.connections
            if isinstance(each, Http1)
            and not each.transport.is_closing()
            and (each.cycle is None or each.cycle.response_complete)
        ]
        min(idle, key=lambda each: each._idle_since).transport.close()  # this one is idle too

    def _refuse(self, status: int, message: str) -> None:
        """Answer, if no answer was begun, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = ApiError(status, message, code="invalid_http").response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode())
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                if output := self.conn.send(event):
                    self.transport.write(output)
        self.transport.close()


def _notice_loss(sock: socket.socket) -> None:
    """Let the system look after a connection on which nothing happens, and give up one whose peer is gone."""
    options = {"TCP_KEEPIDLE": _PROBE_AFTER_S, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": LOST_TIMEOUT_S * 1000}
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:  # some systems lack some of them
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _most_connections() -> int:
    """Half of the files that may be open, as requests need others besides their connection."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, files // 2)
