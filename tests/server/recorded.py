"""Exchanges with a real server, kept as JSON, and a server that gives their answers again to the same requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "recordings"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request and its answer; ``chunks`` are the body as it was cut by the chunked encoding, else one of it."""

    method: str
    path: str
    body: Any
    status: int
    headers: list[list[str]]
    chunks: list[str]

    def answers(self, method: str, path: str, body: Any) -> bool:
        return (self.method, self.path, self.body) == (method, path, body)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Relay

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        found = self.server.answer(self.command, self.path, body, dict(self.headers))
        self.send_response_only(found.status)
        for name, value in found.headers:
            self.send_header(name, value)
        self.end_headers()
        chunked = ["transfer-encoding", "chunked"] in [[name.lower(), value] for name, value in found.headers]
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked may have heard enough
            for content in (chunk.encode() for chunk in found.chunks):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content) if chunked else content)
                self.wfile.flush()
            if chunked:
                self.wfile.write(b"0\r\n\r\n")

    def handle(self) -> None:
        with suppress(ConnectionResetError):
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        return


Answer = Callable[[str, str, Any, dict[str, str]], Recorded]


class Relay(ThreadingHTTPServer):
    """A server on a free port whose answers come from ``answer``, byte for byte."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def relaying(answer: Answer) -> Iterator[str]:
    """The URL of a :class:`Relay` that runs meanwhile."""
    server = Relay(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def replayed(recording: str, case: str) -> Iterator[str]:
    """The URL of a server that answers one case of a recording; every request must be asked, as often, to the letter.

    A request that is none of them fails the test and is answered by status 500.
    """
    left = [Recorded(**each) for each in load(recording)["cases"][case]]
    strange: list[Any] = []
    lock = threading.Lock()

    def answer(method: str, path: str, body: Any, _: dict[str, str]) -> Recorded:
        with lock:
            for place, each in enumerate(left):
                if each.answers(method, path, body):
                    return left.pop(place)
            strange.append((method, path, body))
        return Recorded(method, path, body, 500, [["Content-Length", "0"]], [])

    with relaying(answer) as url:
        yield url
    assert not strange, f"asked, but not recorded: {strange}"
    assert not left, f"recorded, but not asked: {[(each.path, each.body) for each in left]}"


def load(recording: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{recording}.json").read_text())
    return content


def store(recording: str, about: dict[str, Any], cases: dict[str, list[Recorded]]) -> None:
    content = {"about": about, "cases": {name: [asdict(each) for each in case] for name, case in cases.items()}}
    (FOLDER / f"{recording}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
