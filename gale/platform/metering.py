"""An engine as one caller may use it: only what they may see, no more than they may use, and all of it written down.

Chat, completions, embeddings, decisions, pages and batches go through this one mechanism, because it is an engine
itself. Before an answer begins its limits are checked and the most that it can cost is set aside; when it ends, however
it ends, what was really used is counted and the rest given back. Nothing of that waits for the database unless a budget
is nearly spent: limits, prices and budgets are read beside requests, and usage is written behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar, cast

import structlog
from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.engine.request import Engine, Reader, Usage
from gale.platform.access import Actor
from gale.platform.admission import Admission
from gale.platform.budgets import Budget, read_budgets, read_processes
from gale.platform.database import Database
from gale.platform.ids import new_id
from gale.platform.limits import Limit, read_limits
from gale.platform.metered_engine import MeteredEngine, MeteredReader
from gale.platform.prices import Price, price_of, read_prices
from gale.platform.purses import Purses
from gale.platform.rates import Rates
from gale.platform.usage_queue import UsageQueue
from gale.platform.watch import Nobody, Watch

FLUSH_S = 1.0
# How soon a limit holds that another process, such as the command line, has set.
REFRESH_S = 2.0

AnyEngine = TypeVar("AnyEngine", bound=Engine)

log = structlog.get_logger("gale.platform.metering")


class Metering:
    """The limits, budgets and usage of one store. From one event loop, where :meth:`run` goes on beside the requests.

    ``clock`` is monotonic, in seconds: no window moves when somebody sets the time. ``now_us`` is the time of day, by
    which budgets begin anew and usage is dated. ``visible`` says whether an actor may know of a model by its name.
    """

    def __init__(
        self,
        database: Database,
        folder: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.now_us = now_us
        self.rates = Rates(clock)
        self.purses = Purses(database, new_id("process"), clock, now_us)
        self.queue = UsageQueue(database, self.purses, folder, now_us)
        self.watch: Watch = Nobody()
        self.visible: Callable[[Actor, str], bool] = lambda actor, name: True
        self._database = database
        self._clock = clock
        self._prices: dict[str, Price] = {}
        self._loaded = False
        self._loading = asyncio.Lock()

    def engine(
        self,
        actor: Actor,
        engine: AnyEngine,
        *,
        batch: bool = False,
        kind: str | None = None,
        request_id: str | None = None,
    ) -> AnyEngine:
        """``engine`` for one request of ``actor``: whatever is asked of it is limited, charged and counted.

        What a ``batch`` asks is charged and has no rate limits. ``kind`` replaces the kind of usage ("completions" or
        "embeddings") where a request is something else to its caller. Raises :class:`NotAllowedError` for an actor
        without a project.
        """
        admission = Admission(
            self,
            actor,
            base=engine.model_id,
            longest=engine.context_length,
            kind=kind,
            batch=batch,
            request_id=request_id,
        )
        metered = MeteredReader if isinstance(engine, Reader) else MeteredEngine
        return cast(AnyEngine, metered(engine, admission, self.watch))

    def record(self, actor: Actor, model: str, kind: str, usage: Usage, *, base: str = "") -> None:
        """Count what was used without an engine of ours, such as the tokens of a training. Nothing limits it."""
        admission = Admission(self, actor, base=base, longest=0, kind=None, batch=True, request_id=None)
        admission.record(model, kind, usage)

    def price(self, model: str, base: str) -> Price:
        """What ``model`` over ``base`` costs."""
        return price_of(self._prices, model, base)

    async def ready(self) -> None:
        """Return when limits, prices and budgets are known, which takes the first request only."""
        if self._loaded:
            return
        async with self._loading:
            if not self._loaded:
                await self.purses.beat()
                await self.refresh()

    async def refresh(self) -> None:
        """Read limits, prices and budgets anew: what was just changed holds from here on. Raises ``StoreError``."""

        def work(connection: Connection) -> tuple[list[Limit], dict[str, Price], list[Budget], dict[str, int]]:
            found = read_budgets(connection, self.now_us())
            return read_limits(connection), read_prices(connection), found, read_processes(connection)

        limits, self._prices, budgets, processes = await self._database.read(work)
        self.rates.load(limits)
        self.purses.load(budgets, processes)
        self.rates.processes = self.purses.living
        self._loaded = True

    async def run(self) -> None:
        """Write usage, renew what is held and read what has changed, until cancelled; then write what is left."""
        refresh_at = 0.0
        try:
            await self._attempt(self.queue.replay)
            while True:
                await self._attempt(self.queue.flush)
                await self._attempt(self.purses.beat)
                if self._clock() >= refresh_at:
                    await self._attempt(self.refresh)
                    refresh_at = self._clock() + REFRESH_S
                await asyncio.sleep(FLUSH_S)
        finally:
            await self.finish()

    async def finish(self) -> None:
        """Write what is left and give back what is held, as far as the database can be reached."""
        with contextlib.suppress(StoreError):
            await self.queue.flush()
            await self.purses.close()

    def close(self) -> None:
        """Leave on disk what could not be written."""
        self.queue.close()

    async def _attempt(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except StoreError as error:
            log.warning("metering_waits_for_the_database", error=error.message, usage_waiting=self.queue.waiting)
