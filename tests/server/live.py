"""Starting a real server in a thread, and waiting for what other threads do."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

from gale.platform.store import Store
from gale.server.app import create_app
from gale.server.edge import EdgeLimits
from gale.server.lifecycle import Lifecycle
from gale.server.origins import Origins
from gale.server.runner import listen, run
from gale.server.sse import StreamLimits
from tests.server.scripted_engine import ScriptedEngine


@dataclass
class Live:
    """A running server, the engine and store behind it, and a client for it."""

    url: str
    port: int
    engine: ScriptedEngine
    store: Store
    http: httpx2.Client
    stop: Callable[[], None]
    app: FastAPI


def start(
    store: Store,
    *,
    static: Path | None = None,
    edge_limits: EdgeLimits | None = None,
    stream_limits: StreamLimits | None = None,
    grace_s: float = 0.2,
    engine: Any = None,
    origins: Origins | None = None,
) -> Live:
    """Run the application in a thread of its own until ``stop``; the engine is a scripted one unless given."""
    engine, lifecycle, ready = engine or ScriptedEngine(), Lifecycle(grace_s), threading.Event()
    app = create_app(
        engine,
        store,
        static=static,
        lifecycle=lifecycle,
        edge_limits=edge_limits,
        stream_limits=stream_limits,
        origins=origins,
    )
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(app, sock, lifecycle, ready.set)))
    thread.start()
    assert ready.wait(20)
    http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def stop() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(lifecycle.drain)
            thread.join(20)
            assert not thread.is_alive()
            loop.close()
        http.close()

    return Live(f"http://127.0.0.1:{port}", port, engine, store, http, stop, app)


def begin(live: Live, path: str, body: object, *, receive_buffer: int | None = None) -> socket.socket:
    """Send a request over a socket of its own, from which nothing is read yet."""
    content = json.dumps(body).encode()
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", live.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return sock


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do; fails after a time that is far beyond any sane one."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)
