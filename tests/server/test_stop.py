"""A server that stops ends things in the reverse of their beginning: what is still being answered is charged before the
server gives back what it holds of budgets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import Connection, select

from gale.engine.request import Event, SamplingParams, Tools
from gale.platform import tables
from gale.platform.budgets import BudgetKey, read_budgets, set_budget
from gale.platform.clock import now_us
from gale.platform.prices import Price, set_price
from gale.platform.store import Store
from gale.server.lifecycle import Lifecycle
from gale.server.runner import _background
from gale.text.template import Message
from tests.server.live import eventually, start
from tests.server.scripted_engine import ScriptedEngine

TOTAL = BudgetKey(("project", "proj_default"), "total")
ENDLESS = [{"role": "user", "content": "endless"}]


class LingeringEngine(ScriptedEngine):
    """Takes its time to end an answer."""

    async def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        events = super().chat(messages, sampling, tools)
        try:
            async for event in events:
                yield event
        finally:
            await asyncio.sleep(0.4)
            await events.aclose()


@pytest.fixture
def own(database_url: str, tmp_path: Path, gale_home: Path) -> Iterator[Store]:
    """A store in which a token costs a micro-unit, and the project may spend a million."""
    opened = Store.open(database_url, files=tmp_path / "files")

    def work(connection: Connection) -> None:
        set_price(connection, "", Price(1_000_000, 1_000_000, 1_000_000))
        set_budget(connection, TOTAL, 1_000_000, now_us())

    asyncio.run(opened.database.write(work))
    yield opened
    opened.close()


def rows_of(store: Store, table: Any) -> list[dict[str, Any]]:
    def work(connection: Connection) -> list[dict[str, Any]]:
        return [dict(row) for row in connection.execute(select(table)).mappings()]

    return asyncio.run(store.database.read(work))


def begin_stream(http: httpx2.Client) -> Iterator[str]:
    body = {"model": "scripted/one", "messages": ENDLESS, "stream": True}
    response = http.send(http.build_request("POST", "/v1/chat/completions", json=body), stream=True)
    lines = response.iter_lines()
    next(lines)
    return lines  # which keep the connection open


def begin_in_background(http: httpx2.Client) -> None:
    body = {"model": "scripted/one", "input": "endless", "background": True}
    assert http.post("/v1/responses", json=body).status_code == 200


def begin_batch(http: httpx2.Client) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
    row = json.dumps({**line, "body": {"model": "scripted/one", "messages": ENDLESS}}).encode()
    file = http.post("/v1/files", files={"file": ("a.jsonl", row)}, data={"purpose": "batch"}).json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert http.post("/v1/batches", json=asked).status_code == 200


@pytest.mark.parametrize(
    "begin",
    [[begin_stream], [begin_in_background], [begin_batch], [begin_stream, begin_in_background, begin_batch]],
    ids=["a stream", "a background response", "a batch", "all of them"],
)
def test_what_is_answered_when_a_server_stops_is_charged_before_it_gives_anything_back(
    own: Store, begin: list[Any]
) -> None:
    engine = LingeringEngine()
    live = start(own, engine=engine)
    close, at_close = own.metering.purses.close, []

    async def watched() -> None:
        at_close.append((engine.active, sum(purse.out for purse in own.metering.purses._purses.values())))
        (budget,) = await own.database.read(lambda connection: read_budgets(connection, now_us()))
        at_close.append((budget.used_micro, budget.held_micro > 0))
        await close()

    own.metering.purses.close = watched  # type: ignore[method-assign]
    try:
        _open = [one(live.http) for one in begin]
        eventually(lambda: engine.active == len(begin))
        # Before the stop it is charged for nothing, and much is held for it.
        (budget,) = rows_of(own, tables.budgets)
        assert (budget["used_micro"], budget["held_micro"] > 0) == (0, True)
    finally:
        live.stop()
    (budget,), events = rows_of(own, tables.budgets), rows_of(own, tables.usage_events)
    spent = sum(event["cost_micro"] for event in events)
    assert len(events) == len(begin) and all(event["output_tokens"] for event in events)
    assert at_close == [(0, 0), (spent, True)]
    assert (budget["used_micro"], budget["held_micro"]) == (spent, 0)
    assert rows_of(own, tables.holds) == rows_of(own, tables.processes) == []


def test_background_work_ends_in_the_reverse_of_its_beginning_one_after_another() -> None:
    said: list[str] = []
    lifecycle = Lifecycle()

    def work(name: str) -> Any:
        async def run() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                said.append(f"{name} is told")
                await asyncio.sleep(0.01)
                said.append(f"{name} has ended")

        return run

    async def fails() -> None:
        raise RuntimeError("long ago")

    lifecycle.background += [work("metering"), fails, work("batches")]

    async def main() -> None:
        async with _background(lifecycle):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert said == ["batches is told", "batches has ended", "metering is told", "metering has ended"]
