"""A server that says to the byte what a test tells it to, for upstreams that misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Exchange", Any], None]

MODELS = {"data": [{"id": "m", "object": "model", "owned_by": "someone", "max_model_len": 64}]}


class Exchange(BaseHTTPRequestHandler):
    """One request; replies write through it. Without a length, the answer ends with the connection."""

    server: RawServer

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.seen.append((self.path, body, dict(self.headers)))
        reply = self.server.replies.get(self.path)
        self.server.open += 1
        try:
            if reply is None:
                self.reply(404, {"error": {"message": "no such address"}})
            else:
                reply(self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up += 1
        finally:
            self.server.open -= 1

    def reply(self, status: int, body: Any, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, *parts: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"content-type": "text/event-stream", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        return


class RawServer(ThreadingHTTPServer):
    """``replies`` by path; ``seen`` are the requests so far as (path, body, headers)."""

    daemon_threads = True
    block_on_close = False  # some replies never end by themselves

    def __init__(self, replies: dict[str, Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.replies = {"/v1/models": lambda exchange, _: exchange.reply(200, MODELS), **replies}
        self.seen: list[tuple[str, Any, dict[str, str]]] = []
        self.open = 0
        self.hung_up = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[Any]:
        return [body for at, body, _ in self.seen if at == path]


@contextmanager
def raw_server(**replies: Reply) -> Iterator[RawServer]:
    """Run a server whose paths are the names, with double underscores for slashes."""
    server = RawServer({"/" + name.replace("__", "/"): reply for name, reply in replies.items()})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def event(content: str | None = None, reason: str | None = None, **more: Any) -> bytes:
    """A chunk of a chat as OpenAI streams it."""
    choice = {"index": 0, "delta": {} if content is None else {"content": content}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice], **more}, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
