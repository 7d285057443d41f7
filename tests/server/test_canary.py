"""A prompt is nowhere but where its owner keeps it: no log line and no row of usage quotes it, whatever fails."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog

from gale.core.logging import configure_logging
from gale.engine.local import LocalEngine
from gale.platform.store import Store
from tests.server.live import Live, eventually

CANARY = "canary-7f3a"
HI = [{"role": "user", "content": CANARY}]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def loud(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    """The log as it is written, at its most talkative."""
    text = StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    configure_logging("DEBUG")
    return text


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path / 'gale.db'}", files=tmp_path / "files")
    yield opened
    opened.close()


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "stream": True, "user": CANARY}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "stop": CANARY, "metadata": {"a": CANARY}}),
    ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": CANARY}]}),
    ("/v1/chat/completions", {"messages": HI, "response_format": {"type": CANARY}}),
    ("/v1/chat/completions", {"messages": HI, "guided_regex": f"(?<={CANARY})"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": CANARY * 5000}]}),
    ("/v1/completions", {"prompt": CANARY, "max_tokens": 3, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": [CANARY, 3]}),
    ("/v1/embeddings", {"input": CANARY}),
    ("/v1/embeddings", {"input": [CANARY, ""]}),
    ("/v1/rerank", {"query": CANARY, "documents": [CANARY]}),
    ("/v1/decisions", {"prompt": CANARY, "labels": [CANARY, "no"]}),
    ("/v1/responses", {"input": CANARY, "max_output_tokens": 16, "store": False, "instructions": CANARY}),
    ("/v1/responses", {"input": [{"role": CANARY}], "store": False}),
    ("/v1/messages", {"messages": HI, "max_tokens": 3}),
    ("/v1/messages/count_tokens", {"messages": HI}),
    ("/v1/moderations", {"input": CANARY}),
    ("/tokenize", {"prompt": CANARY}),
    (f"/v1/{CANARY}", {}),
]


def test_no_prompt_is_written_down(
    own: Store, launch: Callable[..., Live], engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = loud(monkeypatch)
    live = launch(store=own, engine=engine)
    for path, fields in ASKED:
        status = live.http.post(path, json={"model": "tiny", **fields}).status_code
        assert status in (200, 400, 404), (path, fields, status)
    assert live.http.post("/v1/chat/completions", content=f'{{"{CANARY}'.encode()).status_code == 415
    asyncio.run(own.metering.queue.flush())
    live.stop()
    lines = [line for line in log.getvalue().splitlines() if json.loads(line).get("path") != f"/v1/{CANARY}"]
    assert len(lines) >= len(ASKED)
    assert CANARY not in "\n".join(lines)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", ["bug", "bug-at-once", "breaks", "unfinished"])
def test_nor_when_the_engine_breaks_over_it(
    own: Store, launch: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, stream: bool
) -> None:
    log = loud(monkeypatch)
    live = launch(store=own)
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": f"{script} {CANARY}"}], "stream": stream}
    live.http.post("/v1/chat/completions", json=body)
    eventually(lambda: '"request"' in log.getvalue())
    live.stop()
    assert CANARY not in log.getvalue()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
