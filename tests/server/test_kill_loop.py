"""Kills under load, over and over: what was acknowledged is there, the database is whole, and no money stays held."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import Connection, select

from gale.platform import tables
from gale.platform.budgets import BudgetKey, read_budgets, set_budget
from gale.platform.clock import now_us
from gale.platform.prices import Price, set_price
from gale.platform.store import Store
from tests.databases import execute
from tests.server.live import eventually
from tests.server.processes import serving

ROUNDS = 5
TOTAL = BudgetKey(("project", tables.DEFAULT_PROJECT), "total")
LIMIT = 10**12
HI: Any = [{"role": "user", "content": "one two three"}]


def keep_working(url: str, done: list[str]) -> None:
    """Until the server is gone; ``done`` are the paths of what it acknowledged."""
    with httpx2.Client(base_url=url, timeout=10) as http, contextlib.suppress(httpx2.TransportError):
        while True:
            made = http.post("/v1/conversations", json={"metadata": {"a": "b"}})
            done.append(f"/v1/conversations/{made.raise_for_status().json()['id']}")
            made = http.post("/v1/responses", json={"model": "scripted/one", "input": "a b", "max_output_tokens": 16})
            done.append(f"/v1/responses/{made.raise_for_status().json()['id']}")
            made = http.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "user_data"})
            done.append(f"/v1/files/{made.raise_for_status().json()['id']}")
            http.post("/v1/chat/completions", json={"model": "scripted/one", "messages": HI}).raise_for_status()


@pytest.mark.slow
def test_what_was_acknowledged_outlives_every_kill(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'gale.db'}"

    def prepare(connection: Connection) -> None:
        set_price(connection, "", Price(1_000_000, 1_000_000, 1_000_000))
        set_budget(connection, TOTAL, LIMIT, now_us())

    with contextlib.closing(Store.open(url)) as store:
        asyncio.run(store.database.write(prepare))
    acknowledged: list[str] = []
    for number in range(ROUNDS):
        with serving(tmp_path) as (process, address):
            before = len(acknowledged)
            workers = [threading.Thread(target=keep_working, args=(address, acknowledged)) for _ in range(4)]
            for worker in workers:
                worker.start()
            eventually(lambda: len(acknowledged) > before + 12)  # noqa: B023
            time.sleep(random.Random(number).uniform(0, 0.3))
            process.kill()
            for worker in workers:
                worker.join()
        assert execute(url, "PRAGMA integrity_check") == [("ok",)]
    with serving(tmp_path) as (process, address), httpx2.Client(base_url=address, timeout=20) as http:
        lost = [path for path in acknowledged if http.get(path).status_code != 200]
        assert lost == []
        process.terminate()
        assert process.wait(30) == 0
    assert len(acknowledged) >= ROUNDS * 12
    with contextlib.closing(Store.open(url)) as store:
        (budget,) = asyncio.run(store.database.read(lambda connection: read_budgets(connection, now_us())))
        events = asyncio.run(store.database.read(lambda c: c.execute(select(tables.usage_events.c.cost_micro)).all()))
    assert budget.held_micro == 0, "a server that is alone frees what its killed ones held"
    assert budget.used_micro == sum(cost for (cost,) in events) > 0
