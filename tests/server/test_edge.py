"""Limits, headers and error bodies that hold for every route."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from tests.server.live import Live, eventually

JSON = {"content-type": "application/json"}


def raw(live: Live, request: bytes, *, end: bool = False) -> tuple[int, bytes]:
    """Send bytes as they are and read until the server closes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
        sock.sendall(request)
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return int(answer.split(b" ", 2)[1]), answer


def test_a_second_request_before_the_first_is_answered_ends_the_connection(live: Live) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    _, answers = raw(live, first + b"GET /healthz HTTP/1.1\nHost: localhost\n\n")
    assert answers.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "//v1/models", 404, "unknown_url"),
        ("GET", "/V1/models", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/api/conversations?limit=x", 400, "invalid_value"),
    ],
)
def test_every_error_has_the_envelope(live: Live, method: str, path: str, status: int, code: str) -> None:
    response = live.http.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/api/conversations"])
def test_security_headers_are_on_every_answer(live: Live, path: str) -> None:
    headers = live.http.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


def test_request_ids(live: Live) -> None:
    assert live.http.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 129, "<script>"):
        made = live.http.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made.startswith("req_")


def test_health(live: Live) -> None:
    assert live.http.get("/healthz").json() == {"status": "ok"}
    assert live.http.get("/readyz").json() == {"status": "ready"}


def test_openapi_describes_the_chat_body(live: Live) -> None:
    operation = live.http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    assert "messages" in json.dumps(operation["requestBody"])


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("size", [65 * 1024, 3 * 1024 * 1024])
def test_large_bodies_are_refused_while_they_are_read(strict: Live, declared: bool, size: int) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(0, size, 1024):
            yield b" " * 1024

    content = b" " * size if declared else pieces()
    response = strict.http.post("/v1/chat/completions", content=content, headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_the_ordinary_limit_is_8_mib(live: Live) -> None:
    for size, status in ((8 * 1024 * 1024, 400), (8 * 1024 * 1024 + 1, 413)):
        assert live.http.post("/v1/chat/completions", content=b" " * size, headers=JSON).status_code == status


def test_a_body_that_comes_too_slowly(strict: Live) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    status, answer = raw(strict, head + b"Content-Length: 100\r\n\r\n{")
    assert status == 408
    assert b"request_timeout" in answer


def test_compressed_bodies_are_refused(live: Live) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    response = live.http.post("/v1/chat/completions", content=bomb, headers={**JSON, "content-encoding": "gzip"})
    assert response.status_code == 415


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", 431),
        (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\nX: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\n\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
         b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    ],
)  # fmt: skip
def test_http_abuse_is_answered_and_closed(live: Live, request_: bytes, status: int) -> None:
    got, answer = raw(live, request_)
    assert got == status
    assert b'{"error":{"message":' in answer


def test_half_a_header_is_not_waited_for(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gale.server.http1.HEAD_TIMEOUT_S", 0.2)
    status, _ = raw(live, b"GET / HTTP/1.1\r\nHost: loc")
    assert status == 408


def test_too_many_requests_at_once_leave_health_standing(strict: Live) -> None:
    body = json.dumps({"model": "scripted/one", "messages": [{"role": "user", "content": "silent"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    before = strict.engine.active
    waiting = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(4)]
    try:
        for sock in waiting:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: strict.engine.active == before + 4)
        refused = strict.http.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
        assert refused.headers["retry-after"]
        assert strict.http.get("/healthz").status_code == 200
    finally:
        for sock in waiting:
            sock.close()
    eventually(lambda: strict.engine.active == before)


def test_the_log_line_has_neither_query_nor_body_nor_key(live: Live) -> None:
    with capture_logs() as lines:
        live.http.post(
            "/v1/chat/completions?q=canary",
            json={"model": "scripted/one", "messages": [{"role": "user", "content": "canary"}]},
            headers={"authorization": "Bearer canary"},
        )
        live.http.get("/a%0ab%1b[31m")
        eventually(lambda: len(lines) == 2)
    assert [line["path"] for line in lines] == ["/v1/chat/completions", "/a%0ab%1b[31m"]
    assert [line["status"] for line in lines] == [200, 404]
    assert "canary" not in repr(lines)
