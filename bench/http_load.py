"""A client so light that it can share a core with what it measures: prepared bytes out, answers counted."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask, and with which key."""

    port: int
    key: str = "none"

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    def request(self, **body: Any) -> bytes:
        """The bytes of one chat request."""
        question = [{"role": "user", "content": "Is it?"}]
        text = json.dumps({"model": "null", "messages": question, **body}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        )
        return head.encode() + text


class Connection:
    """One kept connection."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> bytes:
        """The whole body of the answer. Raises SystemExit for another status than 200."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._target.port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise SystemExit(f"port {self._target.port} answers {head.decode()}{(await reader.read(2000)).decode()}")
        if b"content-length:" in head:
            return await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return body

    def close(self) -> None:
        """Let go."""
        if self._streams is not None:
            self._streams[1].close()


async def at_rate(target: Target, per_second: float, seconds: float) -> list[float]:
    """Seconds that each of ``per_second * seconds`` requests took, sent at their times whatever the others do."""
    request = target.request()
    idle: list[Connection] = []
    took: list[float] = []

    async def one() -> None:
        connection = idle.pop() if idle else Connection(target)
        began = time.perf_counter()
        await connection.ask(request)
        took.append(time.perf_counter() - began)
        idle.append(connection)

    begin = time.perf_counter()
    tasks = []
    for number in range(int(per_second * seconds)):
        await asyncio.sleep(max(0.0, begin + number / per_second - time.perf_counter()))
        tasks.append(asyncio.create_task(one()))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return took


async def as_many(target: Target, requests: int, at_once: int) -> float:
    """Seconds for ``requests``, ``at_once`` at a time."""
    request = target.request()
    left = iter(range(requests))
    began = time.perf_counter()

    async def keep_asking() -> None:
        connection = Connection(target)
        for _ in left:
            await connection.ask(request)
        connection.close()

    await asyncio.gather(*(keep_asking() for _ in range(at_once)))
    return time.perf_counter() - began


async def streams(target: Target, count: int, tokens: int) -> list[int]:
    """Words that each of ``count`` streams of ``tokens`` words brought before its [DONE]; -1 for one without."""
    request = target.request(stream=True, max_tokens=tokens)

    async def one(number: int) -> int:
        await asyncio.sleep(number / count)  # people do not all ask in the same moment
        connection = Connection(target)
        body = await connection.ask(request)
        connection.close()
        return body.count(b'"content":"word "') if body.endswith(b"data: [DONE]\n\n") else -1

    return list(await asyncio.gather(*(one(number) for number in range(count))))
