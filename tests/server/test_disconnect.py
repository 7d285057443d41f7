"""Clients that hang up, stop reading or wait long; and servers that stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import httpx2
import pytest

from gale.engine.request import Event, SamplingParams
from gale.platform.store import Store
from gale.server.app import create_app
from gale.server.lifecycle import Lifecycle
from gale.server.sse import StreamLimits
from tests.server.live import Live, begin, eventually
from tests.server.scripted_engine import ScriptedEngine


def send(live: Live, content: str, *, stream: bool, receive_buffer: int | None = None) -> socket.socket:
    """A chat request over a socket of our own, from which nothing is read yet."""
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": content}], "stream": stream}
    return begin(live, "/v1/chat/completions", body, receive_buffer=receive_buffer)


def read_until(sock: socket.socket, text: bytes) -> bytes:
    answer = b""
    while text not in answer:
        part = sock.recv(65536)
        assert part, answer
        answer += part
    return answer


@pytest.mark.parametrize("content", ["endless", "silent"])
@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_stops_the_engine(launch: Callable[..., Live], content: str, stream: bool) -> None:
    live = launch()
    sock = send(live, content, stream=stream)
    eventually(lambda: live.engine.active == 1)
    if stream and content == "endless":
        read_until(sock, b"tick")
    sock.close()
    eventually(lambda: live.engine.active == 0)
    assert (live.engine.closed_early, live.engine.finished) == (1, 0)


def test_a_client_that_never_reads_is_given_up_and_delays_nobody(strict: Live) -> None:
    before = strict.engine.closed_early
    stuck = send(strict, "flood", stream=True, receive_buffer=4096)
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": "hello"}]}
    assert strict.http.post("/v1/chat/completions", json=body).status_code == 200
    eventually(lambda: strict.engine.closed_early == before + 1)
    stuck.close()


class CountedFlood(ScriptedEngine):
    """Writes pieces of 10 KB for ever, and counts them."""

    pieces = 0

    async def _script(self, content: str, prompt: int, sampling: SamplingParams) -> AsyncGenerator[Event, None]:
        async for event in super()._script(content, prompt, sampling):
            self.pieces += content == "flood"
            yield event


def test_many_clients_that_never_read_take_no_more_memory_than_their_queues(launch: Callable[..., Live]) -> None:
    clients, queue = 20, 8
    live = launch(engine=CountedFlood(), stream_limits=StreamLimits(send_timeout_s=30, queue_events=queue))
    stuck = [send(live, "flood", stream=True, receive_buffer=4096) for _ in range(clients)]
    eventually(lambda: live.engine.active == clients)
    seen = -1
    while seen != live.engine.pieces:  # until everybody's queue is full
        seen = live.engine.pieces
        body = {"model": "scripted/one", "messages": [{"role": "user", "content": "hello"}]}
        for _ in range(5):
            assert live.http.post("/v1/chat/completions", json=body).status_code == 200
    # What is on its way in the system's own buffers comes on top: a few megabytes for each at most.
    assert live.engine.pieces < clients * (queue + 700)
    assert live.engine.closed_early == 0
    for sock in stuck:
        sock.close()
    eventually(lambda: live.engine.active == 0)


def test_a_long_silence_is_filled_with_comments(strict: Live) -> None:
    with send(strict, "silent", stream=True) as sock:
        answer = read_until(sock, b": keep-alive\n\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.partition(b"\r\n\r\n")[2].endswith(b": keep-alive\n\n\r\n")
        assert b"data: {" not in answer


def test_an_answer_after_comments_is_whole(strict: Live) -> None:
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": "late but whole"}], "stream": True}
    text = strict.http.post("/v1/chat/completions", json=body).text
    assert text.startswith(": keep-alive\n\n")
    events = [line for line in text.split("\n\n") if line.startswith("data: ")]
    words = [json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(words) == "late but whole"
    assert events[-1] == "data: [DONE]"


def test_stopping_ends_streams_with_an_error_event_and_whole_answers_with_503(launch: Callable[..., Live]) -> None:
    live = launch()
    stream, whole = send(live, "endless", stream=True), send(live, "silent", stream=False)
    read_until(stream, b"tick")
    eventually(lambda: live.engine.active == 2)
    live.stop()
    assert b"server_shutting_down" in read_until(stream, b"0\r\n\r\n")
    assert read_until(whole, b"}}").startswith(b"HTTP/1.1 503 ")
    assert live.engine.active == 0


def test_a_short_answer_is_finished_before_stopping(launch: Callable[..., Live]) -> None:
    live = launch(grace_s=5)
    stream = send(live, "late answer", stream=True)
    eventually(lambda: live.engine.active == 1)
    live.stop()
    assert b"[DONE]" in read_until(stream, b"0\r\n\r\n")


def test_a_draining_server_takes_nothing_new(store: Store) -> None:
    lifecycle = Lifecycle()
    app = create_app(ScriptedEngine(), store, lifecycle=lifecycle)

    async def statuses() -> dict[str, int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return {path: (await http.get(path)).status_code for path in ("/v1/models", "/readyz", "/healthz")}

    assert asyncio.run(statuses()) == {"/v1/models": 200, "/readyz": 200, "/healthz": 200}
    lifecycle.drain()
    assert asyncio.run(statuses()) == {"/v1/models": 503, "/readyz": 503, "/healthz": 200}


def test_a_connection_that_takes_nothing_is_cut(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gale.server.http1.STUCK_TIMEOUT_S", 0.3)
    before = live.engine.closed_early
    stuck = send(live, "flood", stream=True, receive_buffer=4096)
    eventually(lambda: live.engine.closed_early == before + 1)
    stuck.close()


def test_a_store_that_cannot_be_written_is_a_503(
    launch: Callable[..., Live], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gale.platform.sqlite.BUSY_TIMEOUT_S", 0.1)
    own = Store.open(f"sqlite:///{tmp_path / 'gale.db'}")
    live = launch(store=own)
    with contextlib.closing(sqlite3.connect(tmp_path / "gale.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = live.http.post("/api/conversations", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert live.http.get("/api/conversations").status_code == 200
    assert live.http.post("/api/conversations", json={}).status_code == 201
    live.stop()
    own.close()
