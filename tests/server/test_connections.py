"""Connections in numbers, and connections behind which nobody is any more."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from gale.server import http1
from tests.server.live import Live, begin, eventually
from tests.server.processes import ROOT, serving

SILENT = {"model": "scripted/one", "messages": [{"role": "user", "content": "silent"}]}


def closed(sock: socket.socket) -> bool:
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_of_too_many_connections_the_idle_make_room_and_the_busy_stay(
    launch: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "MOST_CONNECTIONS", 50)
    live = launch()
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(begin(live, "/v1/chat/completions", SILENT)) for _ in range(10)]
        eventually(lambda: live.engine.active == len(busy))
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", live.port))) for _ in range(300)]
        for _ in range(3):  # each over a connection of its own
            assert httpx2.get(f"{live.url}/healthz", timeout=20).status_code == 200
        eventually(lambda: sum(map(closed, idle)) >= len(idle) - 50)
        assert not any(map(closed, busy))
        assert live.engine.active == len(busy)
        assert not closed(idle[-1]), "the one that has waited longest goes first"
    eventually(lambda: live.engine.active == 0)


def test_as_many_files_as_allowed_may_be_open_and_nothing_is_dumped() -> None:
    code = (
        "import resource; from gale.server.process_limits import prepare_process; prepare_process();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE), *resource.getrlimit(resource.RLIMIT_CORE))"
    )

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=narrow, capture_output=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [b"300", b"300", b"0", b"0"]


def test_with_few_files_to_open_requests_are_still_answered(tmp_path: Path) -> None:
    """More connections than files: those beyond half of them make room, and the database still opens its own."""

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    with serving(tmp_path, prepare=narrow) as (process, url), contextlib.ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        for _ in range(600):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert httpx2.get(f"{url}/healthz", timeout=30).status_code == 200
        assert httpx2.post(f"{url}/api/conversations", json={}, timeout=30).status_code == 201
        process.terminate()
        assert process.wait(30) == 0


def test_a_peer_that_is_lost_without_a_word_is_given_up() -> None:
    """Packets that go nowhere: neither the client nor its system says that the connection is over."""
    ours = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    try:
        allowed = subprocess.run([*ours, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("a network of one's own is not allowed here, or there is no unshare or ip")
    done = subprocess.run(
        [*ours, sys.executable, "-m", "tests.server.lost_peer"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.endswith("given up\n"), done.stdout + done.stderr
