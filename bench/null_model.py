"""A model that costs nothing, so that what is measured is the service around it.

    python bench/null_model.py upstream PORT    an OpenAI-compatible server of a few lines, for gateways to stand before
    python bench/null_model.py serve PORT       Gale's own server, with keys and all, over an engine that just counts

The engine writes ``max_tokens`` words, ``GALE_NULL_RATE`` a second (0: at once).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

ANSWER = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "created": 0,
    "model": "null",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10},
}
MODELS = {"object": "list", "data": [{"id": "null", "object": "model", "created": 0, "owned_by": "bench"}]}


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection to the upstream: every request gets the same answer, streamed where it asks for that."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head.split("\r\n")[1:]}
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            if b'"stream":true' in body.replace(b" ", b""):
                writer.write(_streamed())
            else:
                text = json.dumps(MODELS if head.startswith("GET") else ANSWER).encode()
                writer.write(_head("application/json", f"content-length: {len(text)}") + text)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _streamed() -> bytes:
    common = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "null"}
    choices = [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"index": 0, "delta": {"content": "Yes."}, "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
    ]
    events = [{**common, "choices": [choice]} for choice in choices]
    events.append({**common, "choices": [], "usage": ANSWER["usage"]})
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"
    return _head("text/event-stream", f"content-length: {len(text)}") + text


def _head(kind: str, length: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{length}\r\n\r\n".encode()


async def upstream(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


def serve(port: int) -> None:
    """Gale's server over :class:`NullEngine`; its database and files lie in GALE_HOME."""
    from gale.core.settings import settings
    from gale.engine.request import Event, Finished, SamplingParams, TextDelta, Tools, Usage
    from gale.platform.store import Store
    from gale.server.app import create_app
    from gale.server.edge import EdgeLimits
    from gale.server.lifecycle import Lifecycle
    from gale.server.runner import listen, run
    from gale.text.template import Message

    pause = 1 / rate if (rate := float(os.environ.get("GALE_NULL_RATE", "0"))) else 0.0

    class NullEngine:
        model_id = "null"
        adapters: tuple[str, ...] = ()
        context_length = 100_000

        def count_prompt_tokens(self, messages: list[Message], tools: Tools | None = None) -> int:
            return 8

        async def chat(
            self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
        ) -> AsyncGenerator[Event, None]:
            words = sampling.max_tokens or 2
            began = time.perf_counter()
            for word in range(words):
                if pause:
                    await asyncio.sleep(max(0.0, began + (word + 1) * pause - time.perf_counter()))
                yield TextDelta("word ")
            yield Finished("stop", Usage(8, words))

    store = Store.open(settings().database_url)
    lifecycle = Lifecycle()
    app = create_app(NullEngine(), store, lifecycle=lifecycle, edge_limits=EdgeLimits(requests=2048))  # type: ignore[arg-type]
    sock = listen("127.0.0.1", port)
    asyncio.run(run(app, sock, lifecycle, lambda: print("ready", flush=True)))
    store.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if sys.argv[1] == "upstream":
        asyncio.run(upstream(int(sys.argv[2])))
    else:
        serve(int(sys.argv[2]))
