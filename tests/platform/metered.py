"""A store of one's own with an engine whose tokens are words, and clocks that a test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from gale.engine.request import Finished, SamplingParams
from gale.platform import tables
from gale.platform.access import Actor
from gale.platform.budgets import Budget, BudgetKey, read_budgets, set_budget
from gale.platform.database import Database
from gale.platform.limits import change_limits
from gale.platform.metering import Metering
from gale.platform.prices import Price, set_price
from gale.text.template import Message
from tests.server.scripted_engine import ScriptedEngine

ACTOR = Actor("org_default", "proj_default", "user_first", "key_one", "member")
PROJECT = ("project", "proj_default")
TOTAL = BudgetKey(PROJECT, "total")
# A micro-unit for each token.
A_MICRO_EACH = Price(1_000_000, 1_000_000, 1_000_000)


class Clocks:
    """The monotonic clock in seconds, and the time of day in microseconds; they go on independently."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.us = 1_700_000_000_000_000

    def monotonic(self) -> float:
        return self.seconds

    def now_us(self) -> int:
        return self.us


class Bench:
    """What the tests of metering work with."""

    def __init__(self, url: str, database: Database, folder: Path | None) -> None:
        self.url = url
        self.database = database
        self.others: list[Database] = []
        self.clocks = Clocks()
        self.engine = ScriptedEngine()
        self.folder = folder
        self.metering = self._metering(database)

    async def another(self) -> Metering:
        """Another server's over the same data; PostgreSQL sees two that share nothing."""
        database = self.database
        if not self.url.startswith("sqlite"):
            database = await asyncio.to_thread(Database.open, self.url)
            self.others.append(database)
        return self._metering(database)

    def _metering(self, database: Database) -> Metering:
        return Metering(database, self.folder, clock=self.clocks.monotonic, now_us=self.clocks.now_us)

    async def limit(self, model: str = "", **values: int | None) -> None:
        await self.database.write(lambda connection: change_limits(connection, PROJECT, model, values))
        await self.metering.refresh()

    async def price(self, price: Price = A_MICRO_EACH, model: str = "") -> None:
        await self.database.write(lambda connection: set_price(connection, model, price))
        await self.metering.refresh()

    async def budget(self, limit_micro: int, key: BudgetKey = TOTAL) -> None:
        await self.database.write(lambda connection: set_budget(connection, key, limit_micro, self.clocks.us))
        await self.metering.refresh()

    async def budgets(self) -> dict[BudgetKey, Budget]:
        found = await self.database.read(lambda connection: read_budgets(connection, self.clocks.us))
        return {budget.key: budget for budget in found}

    async def rows(self, table: str) -> list[dict[str, Any]]:
        def work(connection: Connection) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(select(getattr(tables, table))).mappings()]

        return await self.database.read(work)

    async def asked(self) -> None:
        """Return when the engine is at a request."""
        while not self.engine.active:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def ask(
        self, text: str, *, actor: Actor = ACTOR, metering: Metering | None = None, batch: bool = False, **sampling: Any
    ) -> Finished:
        """One request with one answer: the engine says ``text`` back."""
        engine = (metering or self.metering).engine(actor, self.engine, batch=batch)
        return await finish(engine, text, **sampling)


async def finish(engine: Any, text: str, **sampling: Any) -> Finished:
    """The end of one answer."""
    events = engine.chat([Message(role="user", content=text)], SamplingParams(**sampling))
    last: Any = None
    try:
        async for event in events:
            last = event
    finally:
        await events.aclose()
    assert isinstance(last, Finished)
    return last


@asynccontextmanager
async def bench(url: str = "sqlite://", folder: Path | None = None) -> AsyncIterator[Bench]:
    """A fresh one."""
    database = await asyncio.to_thread(Database.open, url)
    made = Bench(url, database, folder)
    try:
        yield made
    finally:
        for each in (database, *made.others):
            await asyncio.to_thread(each.close)
