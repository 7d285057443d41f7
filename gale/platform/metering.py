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
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import structlog
from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.engine.request import Engine, Reader
from gale.platform.access import Actor
from gale.platform.admission import Admission
from gale.platform.budgets import Budget, BudgetSpentError, read_budgets, read_processes
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.ids import new_id
from gale.platform.limits import Limit, read_limits
from gale.platform.metered_engine import MeteredEngine, MeteredReader
from gale.platform.prices import Price, price_of, read_prices
from gale.platform.purses import LIFE_S, Purses
from gale.platform.rates import Rates
from gale.platform.scopes import scopes_of
from gale.platform.usage import DAY_US, HOUR_US, requests_by_hour
from gale.platform.usage_queue import UsageQueue
from gale.platform.watch import Nobody, Watch

FLUSH_S = 1.0
# How soon a limit holds that another process, such as the command line, has set.
REFRESH_S = 2.0

AnyEngine = TypeVar("AnyEngine", bound=Engine)
Result = TypeVar("Result")

log = structlog.get_logger("gale.platform.metering")


@dataclass(frozen=True, slots=True)
class _Found:
    """What the database says, all at one moment; requests of the last day by hour, of limits that are new here."""

    limits: list[Limit]
    prices: dict[str, Price]
    budgets: list[Budget]
    processes: dict[str, int]
    requests: dict[Limit, list[tuple[int, int]]]


class Metering:
    """The limits, budgets and usage of one store. From one event loop, where :meth:`run` goes on beside the requests.

    ``clock`` is monotonic, in seconds: no window moves when somebody sets the time. ``now_us`` is the time of day, by
    which budgets begin anew and usage is dated. One that is ``alone`` knows that no other server has the database open,
    so whatever others held is free. ``visible`` says whether an actor may know of a model by its name.
    """

    def __init__(
        self,
        database: Database,
        folder: Path | None = None,
        *,
        alone: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now_us: Callable[[], int] = now_us,
    ) -> None:
        self.now_us = now_us
        self.rates = Rates(clock)
        self.purses = Purses(database, new_id("process"), clock, now_us, alone=alone)
        self.queue = UsageQueue(database, self.purses, folder, now_us)
        self.watch: Watch = Nobody()
        self.visible: Callable[[Actor, str], bool] = lambda actor, name: True
        self._database = database
        self._clock = clock
        self._prices: dict[str, Price] = {}
        self._reads: dict[type, bool] = {}
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
        kind_of_engine = type(engine)
        if kind_of_engine not in self._reads:  # asked once, as it takes a while to find out
            self._reads[kind_of_engine] = isinstance(engine, Reader)
        metered = MeteredReader if self._reads[kind_of_engine] else MeteredEngine
        return cast(AnyEngine, metered(engine, admission, self.watch))

    def admission(self, actor: Actor, model: str, *, batch: bool = False, request_id: str | None = None) -> Admission:
        """One request of ``actor`` for a ``model`` that is no engine."""
        return Admission(self, actor, base=model, longest=0, kind=None, batch=batch, request_id=request_id)

    def price(self, model: str, base: str) -> Price:
        """What ``model`` over ``base`` costs."""
        return price_of(self._prices, model, base)

    async def ready(self) -> None:
        """Return when limits, prices and budgets are known, which takes the first request only."""
        if self._loaded:
            return
        async with self._loading:
            if not self._loaded:
                # First what a killed server used, then that what it held is free.
                await self._done(self.queue.replay)
                await self.purses.beat()
                await self.refresh()

    async def refresh(self) -> None:
        """Read limits, prices and budgets anew: what was just changed holds from here on. Raises ``StoreError``."""

        now = self.now_us()

        def work(connection: Connection) -> _Found:
            limits = read_limits(connection)
            daily = [limit for limit in limits if limit.requests_per_day is not None and not self.rates.knows(limit)]
            return _Found(
                limits,
                read_prices(connection),
                read_budgets(connection, now),
                read_processes(connection),
                {limit: requests_by_hour(connection, limit.scope, limit.model, now - DAY_US) for limit in daily},
            )

        found = await self._database.read(work)
        self._prices = found.prices
        self.purses.load(found.budgets, found.processes)
        self.rates.load(found.limits, self.purses.living)
        for limit, hours in found.requests.items():
            for hour, requests in hours:
                # As if they had all come at the end of their hour.
                self.rates.count_earlier(limit, requests, max(0.0, (now - hour - HOUR_US) / 1e6))
        self._loaded = True

    async def with_all_that_is_free(self, actor: Actor, work: Callable[[], Awaitable[Result]]) -> Result:
        """The result of ``work`` for ``actor``, done again where a budget of theirs was too small while this process
        kept some of it to itself.

        Raises what ``work`` does, :class:`BudgetSpentError` among it.
        """
        try:
            return await work()
        except BudgetSpentError:
            if not await self.purses.give_back(scopes_of(actor)):
                raise
            return await work()

    async def run(self) -> None:
        """Write usage, renew what is held and read what has changed, until cancelled; then write what is left."""
        every = {self.queue.replay: LIFE_S, self.queue.flush: 0.0, self.purses.beat: 0.0, self.refresh: REFRESH_S}
        due = dict.fromkeys(every, 0.0)
        try:
            while True:
                for work, pause_s in every.items():
                    if self._clock() >= due[work] and await self._done(work):
                        due[work] = self._clock() + pause_s
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

    async def _done(self, work: Callable[[], Awaitable[None]]) -> bool:
        try:
            await work()
        except (StoreError, OSError) as error:
            log.warning("metering_waits_for_the_database", error=str(error), usage_waiting=self.queue.waiting)
            return False
        return True
