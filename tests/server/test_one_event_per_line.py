"""Whatever a model writes is one event of a stream, also to clients that end lines where the format does not."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from openai import OpenAI

from gale.engine.request import Event, Finished, SamplingParams, TextDelta, Usage
from tests.server.live import Live
from tests.server.scripted_engine import ScriptedEngine

# Every character at which Python's own line reader ends a line among them.
TEXT = 'a\n\ndata: [DONE]\r\n\r\nevent: error\rdata: {"error": 1}\n: x\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029id: 7\n\n'


class Says(ScriptedEngine):
    """Says :data:`TEXT`, whatever it is asked."""

    async def _script(self, content: str, prompt: int, sampling: SamplingParams) -> AsyncGenerator[Event, None]:
        for piece in (TEXT[:20], TEXT[20:]):
            yield TextDelta(piece)
        yield Finished("stop", Usage(prompt, 2))


@pytest.fixture
def live(launch: Callable[..., Live]) -> Live:
    return launch(engine=Says())


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 9}),
    ],
)
def test_text_that_looks_like_events_stays_within_its_own(live: Live, path: str, body: dict[str, Any]) -> None:
    content = live.http.post(path, json={"model": "scripted/one", "stream": True, **body}).content.decode()
    lines = content.splitlines()
    assert all(line == "" or line.startswith(("data: {", "event: ", "data: [DONE]")) for line in lines)
    assert lines.count("data: [DONE]") == (path == "/v1/chat/completions")
    for line in lines:
        if line.startswith("data: {"):
            json.loads(line.removeprefix("data: "))


def test_it_arrives_as_it_was_written(live: Live) -> None:
    client = OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    chunks = client.chat.completions.create(model="scripted/one", messages=HI, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    conversation = live.http.post("/api/conversations", json={}).json()["id"]
    turn = live.http.post(f"/api/conversations/{conversation}/turns", json={"content": "hi"}).content.decode()
    events = [block.splitlines() for block in turn.strip().split("\n\n")]
    assert all(len(event) == 2 for event in events)
    assert json.loads(events[-1][1].removeprefix("data: "))["message"]["content"] == TEXT
