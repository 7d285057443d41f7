"""Runs the application on a socket until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import HANDLED_SIGNALS

from gale.core.errors import GaleError
from gale.server.disconnect import cancel
from gale.server.http1 import MOST_HEAD_BYTES, Http1
from gale.server.lifecycle import Lifecycle
from gale.server.local_guard import is_loopback

# Streams end by themselves when the lifecycle's grace is over; this is for what does not.
STOP_TIMEOUT_S = 5


def listen(host: str, port: int, *, accounts: bool = False) -> socket.socket:
    """A socket that listens on ``host``; port 0 lets the system choose.

    Done before the model is loaded, so that a port in use is known at once; clients that are early wait. Raises
    :class:`GaleError` for an address that is in use, not allowed or not of this machine, and without ``accounts`` for
    one that others reach.
    """
    if not accounts and not is_loopback(host):
        raise GaleError(
            f"Gale does not serve on {host}: everybody who reaches that address could use it, as it has no keys yet.",
            hint="Make an owner and a key first with `gale admin init`, or serve on 127.0.0.1 (the default).",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError) as error:
        raise GaleError(f"{host}:{port} is not an address: {error}.") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # At once, and not when the model is loaded: two bound sockets may share a port until one of them listens.
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise _explain(error, host, port) from error
    return sock


def address_of(sock: socket.socket, host: str) -> str:
    """What to open in a browser."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sock.getsockname()[1]}"


async def run(app: ASGIApp, sock: socket.socket, lifecycle: Lifecycle, on_ready: Callable[[], None]) -> None:
    """Serve ``app`` until SIGINT, SIGTERM or ``lifecycle.drain()``, then return; open streams are ended first."""
    logging.getLogger("uvicorn").addHandler(_ToStructlog(logging.WARNING))
    config = uvicorn.Config(
        app,
        http=Http1,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
    )
    server = _Server(config, lifecycle, on_ready)
    async with _background(lifecycle):
        await server.serve(sockets=[sock])
        # What had to be cancelled still gets to store what it has, and to be charged for it.
        if tasks := set(server.server_state.tasks):
            await asyncio.wait(tasks, timeout=2)


@contextlib.asynccontextmanager
async def _background(lifecycle: Lifecycle) -> AsyncIterator[None]:
    """The server's other work, ended as :class:`Lifecycle` says; what ends with an error is logged."""

    async def guarded(work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception:
            structlog.get_logger("gale.server").exception("background work ended")

    tasks = [asyncio.ensure_future(guarded(work)) for work in lifecycle.background]
    try:
        yield
    finally:
        for task in reversed(tasks):
            await cancel(task)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._lifecycle.draining

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._lifecycle.drain()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised again: being told to stop is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _ToStructlog(logging.Handler):
    """uvicorn's warnings, in the same form as everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger("uvicorn").log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _explain(error: OSError, host: str, port: int) -> GaleError:
    if error.errno == errno.EADDRINUSE:
        return GaleError(
            f"Port {port} on {host} is in use by another program, perhaps another Gale.",
            hint=f"Stop it (`ss -ltnp 'sport = :{port}'` names it), or choose another port with --port.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return GaleError(f"Not allowed to use port {port}.", hint="Choose a port above 1023 with --port.")
    return GaleError(f"Cannot listen on {host}:{port}: {error.strerror}.", hint="Choose another --host or --port.")
