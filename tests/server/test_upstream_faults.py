"""Upstreams that die, stall or talk nonsense: always a clean failure, and never half an answer for a whole one."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from gale.core.errors import GaleError
from gale.core.settings import settings
from gale.engine import upstream_http
from gale.engine.request import (
    EngineFailedError,
    Finished,
    SamplingParams,
    TextDelta,
    Usage,
)
from gale.engine.upstream import UpstreamEngine
from tests.server.live import eventually
from tests.server.raw_server import DONE, Exchange, event, raw_server
from tests.server.upstreams import all_of, ask, on, user, whole


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_http, "_FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([event("half "), b"data: {not json}\n\n"], "not JSON"),
        ([event("half "), b"data: [1, 2]\n\n"], "no JSON object"),
        ([event("half "), b'data: {"choices": [{"index": "x"}]}\n\n'], "wrong choices.0.index"),
        ([event("half "), b'data: {"choices": 5}\n\n'], "wrong choices"),
        ([event("half "), b"data: " + b"[" * 100_000 + b"\n\n"], "not JSON"),
        ([event("half "), b"data: " + b"x" * (2 * 1024 * 1024) + b"\n\n"], "event is too long"),
        ([event("half "), b"data: " + b"x" * (2 * 1024 * 1024)], "event is too long"),
        ([event("half ")], "without an end"),
        ([event("half "), DONE], "without an end"),
        ([event("half "), b'data: {"error": {"message": "boom", "code": 500}}\n\n'], "boom"),
        ([event("half "), b'data: {"object": "error", "message": "boom", "code": 500}\n\n'], "boom"),
        ([event("half "), event(reason="abort")], "gave up"),
    ],
)
def test_a_stream_that_cannot_be_read_is_a_clean_failure(parts: list[bytes], problem: str) -> None:
    with raw_server(v1__chat__completions=whole(*parts)) as server:

        async def check(engine: UpstreamEngine) -> None:
            events = engine.chat(user("hi"), SamplingParams())
            assert await anext(events) == TextDelta("half ")
            with pytest.raises(EngineFailedError, match=problem):
                await all_of(events)

        on(server.url, check)
        assert len(server.bodies("/v1/chat/completions")) == 1  # nothing is asked twice once something has come


def test_a_stream_may_come_in_any_pieces_and_with_anything_beside_it() -> None:
    stream = b"".join(
        [
            b": a comment\n\nretry: 5\n\nevent: ping\ndata: {}\n\n",
            b'data: {"choices": [], "prompt_filter_results": []}\n\n',
            b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}]}\r\n\r\n',
            event("风从"),
            b'data: {"choices": [{"index": 1, "delta": {"content": "another choice"}}]}\n\n',
            'data: {"choices": [{"index": 0, "delta": {"content": "山 🎉"}, "logprobs": null}]}\n\n'.encode(),
            event(None, "stop"),
            b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}\n\n',
            DONE,
        ]
    )
    pieces = [stream[at : at + 1] for at in range(len(stream))]
    with raw_server(v1__chat__completions=whole(*pieces)) as server:
        assert ask(server.url) == ("风从山 🎉", Finished("stop", Usage(3, 4)))


@pytest.mark.parametrize("ending", [[], [b"data: {broken\n\n"], [DONE]])
def test_an_answer_that_has_ended_is_whole_even_if_the_counts_are_missing(ending: list[bytes]) -> None:
    with raw_server(v1__chat__completions=whole(event("a"), event("b"), event(None, "length"), *ending)) as server:
        text, end = ask(server.url)
        assert (text, end.reason, end.usage.completion_tokens) == ("ab", "length", 2)
        assert end.usage.prompt_tokens > 0


def test_a_connection_cut_within_a_chunk_is_a_clean_failure() -> None:
    def cut(exchange: Exchange, _: Any) -> None:
        exchange.protocol_version = "HTTP/1.1"
        exchange.stream(b"10000\r\n" + event("half "), headers={"transfer-encoding": "chunked", "connection": "close"})

    with raw_server(v1__chat__completions=cut) as server, pytest.raises(EngineFailedError, match="broke off"):
        ask(server.url)


def test_a_chunk_that_cannot_be_read_is_a_clean_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "upstream_read_s", 0.5)

    def broken(exchange: Exchange, _: Any) -> None:
        exchange.protocol_version = "HTTP/1.1"
        first = event("half ")
        exchange.stream(f"{len(first):x}\r\n".encode() + first + b"\r\n", headers={"transfer-encoding": "chunked"})
        time.sleep(0.1)
        exchange.wfile.write(b"zz\r\n")
        time.sleep(3)

    with (
        raw_server(v1__chat__completions=broken) as server,
        pytest.raises(EngineFailedError, match=r"silent|broke off"),
    ):
        ask(server.url)


def test_an_upstream_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("upstream_connect_s", "upstream_read_s"):
        monkeypatch.setattr(settings(), name, 0.2)

    async def send(port: int) -> None:
        http = upstream_http.UpstreamHttp(f"http://127.0.0.1:{port}", None)
        try:
            async with http.open("chat/completions", {"text": "x" * 2**25}, set()):
                pass
        finally:
            await http.close()

    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(EngineFailedError, match="silent"):
        asyncio.run(asyncio.wait_for(send(listening.getsockname()[1]), 30))


def test_small_questions_and_answers_go_through_the_same_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://upstream.invalid/v1"
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with raw_server() as proxy:
        proxy.replies[f"{address}/models"] = proxy.replies["/v1/models"]
        proxy.replies[f"{address}/chat/completions"] = whole(event("through"), event(None, "stop"), DONE)
        monkeypatch.setenv("all_proxy", proxy.url)
        assert ask(address)[0] == "through"
    monkeypatch.setenv("no_proxy", "upstream.invalid")
    assert upstream_http._proxy_of(address) is None
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(GaleError, match="http://host:port"):
        ask(address)


def test_stop_strings_hold_even_where_the_upstream_ignores_them() -> None:
    def endless(exchange: Exchange, _: Any) -> None:
        exchange.stream(event("one ST"), event("OP two"))
        while True:
            exchange.wfile.write(event("more"))
            time.sleep(0.01)

    with raw_server(v1__chat__completions=endless) as server:
        text, end = ask(server.url, SamplingParams(stop=("STOP",)))
        assert (text, end.reason) == ("one ", "stop")
        eventually(lambda: server.hung_up == 1)  # and the connection was closed


def test_silence_ends_with_an_error_and_comments_keep_a_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(exchange: Exchange, _: Any) -> None:
        exchange.stream(event("half "))
        time.sleep(5)

    def slow(exchange: Exchange, _: Any) -> None:
        exchange.stream()
        for _ in range(10):
            exchange.wfile.write(b": keep-alive\n\n")
            time.sleep(0.1)
        exchange.wfile.write(event("late", "stop") + DONE)

    monkeypatch.setattr(settings(), "upstream_read_s", 0.5)
    with raw_server(v1__chat__completions=silent) as server, pytest.raises(EngineFailedError, match="silent"):
        ask(server.url)
    with raw_server(v1__chat__completions=slow) as server:
        assert ask(server.url)[0] == "late"


def test_what_may_pass_is_tried_again_before_the_first_byte_and_only_then() -> None:
    def refusing(times: int, status: int) -> Callable[[Exchange, Any], None]:
        left = [times]

        def reply(exchange: Exchange, _: Any) -> None:
            left[0] -= 1
            if left[0] >= 0 and status:
                exchange.reply(status, {"error": {"message": "Loading model"}})
            elif left[0] >= 0:
                exchange.connection.shutdown(socket.SHUT_RDWR)  # hangs up without a word
            else:
                exchange.stream(event("here", "stop"), DONE)

        return reply

    for status in (502, 503, 0):
        with raw_server(v1__chat__completions=refusing(2, status)) as server:
            assert ask(server.url)[0] == "here"
        with raw_server(v1__chat__completions=refusing(3, status)) as server:
            with pytest.raises(EngineFailedError):
                ask(server.url)
            assert len(server.bodies("/v1/chat/completions")) == 3
    with raw_server(v1__chat__completions=refusing(1, 500)) as server:
        with pytest.raises(EngineFailedError, match="Loading model"):
            ask(server.url)
        assert len(server.bodies("/v1/chat/completions")) == 1
