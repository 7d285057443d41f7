"""The ledger under everything that can happen to it, in any order: requests and trainings that end in any way, servers
that are killed and start again, limits that change. After every step nobody has been promised more than there is.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from sqlalchemy import Connection

from gale.engine.request import Usage
from gale.platform.admission import Admission, Ticket
from gale.platform.budgets import BudgetKey, BudgetSpentError, charge, hold, release
from gale.platform.database import Database
from gale.platform.ids import new_id
from gale.platform.metering import Metering
from gale.platform.purses import BEAT_S, LIFE_S
from gale.platform.usage import UsageEvent, write_events
from tests.platform.metered import ACTOR, PROJECT, Bench

Result = TypeVar("Result")

WIDE = BudgetKey(("organisation", "org_default"), "total")
NARROW = BudgetKey(PROJECT, "total")


class Ledger(RuleBasedStateMachine):
    """Three servers over one database. A ticket is a request that one of them has let pass; a training is a job that
    none of them holds for, and its most tokens."""

    tickets = Bundle("tickets")
    trainings = Bundle("trainings")

    @initialize(wide=st.integers(50, 400), narrow=st.integers(50, 400))
    def begin(self, wide: int, narrow: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.database = Database.open("sqlite://")
        self.bench = Bench("sqlite://", self.database, Path(self.folder.name))
        self.limits = {WIDE: wide, NARROW: narrow}
        self.cost = 0  # of everything that was used
        self.trainings_held = 0
        self.run(self.bench.price())
        for key, limit in self.limits.items():
            self.run(self.bench.budget(limit, key))
        self.servers: list[Metering] = [self.started() for _ in range(3)]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    def started(self) -> Metering:
        async def start() -> Metering:
            server = await self.bench.another()
            await server.queue.replay()
            await server.ready()
            return server

        return self.run(start())

    @rule(target=tickets, server=st.integers(0, 2), prompt=st.integers(0, 20), answer=st.integers(0, 60))
    def ask(self, server: int, prompt: int, answer: int) -> tuple[Metering, Ticket, int, int] | None:
        metering = self.servers[server]
        admission = Admission(metering, ACTOR, base="m", longest=80, kind=None, batch=False, request_id=None)

        async def ask() -> Ticket | None:
            try:
                return await admission.begin(None, "completions", [0] * prompt, lambda: prompt, answer)
            except BudgetSpentError:
                return None
            finally:
                await asyncio.gather(*metering.purses._filling)  # what is fetched ahead of need

        ticket = self.run(ask())
        return ticket and (metering, ticket, prompt, answer)

    @rule(ticket=consumes(tickets), share=st.floats(0, 1))
    def end(self, ticket: tuple[Metering, Ticket, int, int] | None, share: float) -> None:
        if ticket is None or ticket[0] not in self.servers:  # refused, or lost with its server
            return
        _, ended, prompt, answer = ticket
        usage = Usage(prompt, int(answer * share)) if share else None
        ended.end(usage)
        self.cost += ended.price.cost(usage or Usage(0, 0))

    @rule(target=trainings, most=st.integers(1, 120))
    def train(self, most: int) -> tuple[str, int] | None:
        job_id, now = new_id("job"), self.bench.clocks.us
        try:
            self.run(self.database.write(lambda c: hold(c, job_id, [WIDE.scope, NARROW.scope], most, now)))
        except BudgetSpentError:
            return None
        self.trainings_held += most
        return job_id, most

    @rule(training=consumes(trainings), share=st.floats(0, 1))
    def end_training(self, training: tuple[str, int] | None, share: float) -> None:
        if training is None:
            return
        job_id, most = training
        tokens = int(most * share)
        whose = ("org_default", "proj_default", None, None)
        event = UsageEvent(job_id, self.bench.clocks.us, *whose, "m", "fine_tuning", 1, 1, tokens, 0, 0, tokens, None)

        def settle(connection: Connection) -> None:
            release(connection, job_id)
            charge(connection, job_id, write_events(connection, [event]), {}, self.bench.clocks.us)

        self.run(self.database.write(settle))
        self.trainings_held -= most
        self.cost += tokens

    @rule(server=st.integers(0, 2))
    def write(self, server: int) -> None:
        self.run(self.servers[server].queue.flush())

    @rule(server=st.integers(0, 2))
    def kill(self, server: int) -> None:
        self.servers[server].queue.close()  # as the system does
        self.servers[server] = self.started()

    @rule(server=st.integers(0, 2))
    def stop(self, server: int) -> None:
        async def stop() -> None:
            await self.servers[server].finish()
            self.servers[server].close()

        self.run(stop())
        self.servers[server] = self.started()

    @rule(seconds=st.sampled_from([1.0, BEAT_S, LIFE_S / 2]))
    def wait(self, seconds: float) -> None:
        async def beat() -> None:
            for server in self.servers:
                await server.refresh()
                await server.purses.beat()

        self.bench.clocks.seconds += seconds
        self.run(beat())

    @rule(key=st.sampled_from([WIDE, NARROW]), more=st.integers(0, 100))
    def raise_limit(self, key: BudgetKey, more: int) -> None:
        self.limits[key] += more
        self.run(self.bench.budget(self.limits[key], key))

    @invariant()
    def nobody_is_promised_more_than_there_is(self) -> None:
        budgets = self.run(self.bench.budgets())
        holds = self.run(self.bench.rows("holds"))
        for key, budget in budgets.items():
            own = {
                row["process_id"]: row["amount_micro"]
                for row in holds
                if (row["scope"], row["scope_id"], row["period"]) == (*key.scope, key.period)
            }
            assert budget.held_micro == sum(own.values())
            assert min(own.values(), default=0) >= 0
            purses = {server.purses.process_id: server.purses._purses[key] for server in self.servers}
            assert all(own.get(name, 0) == purse.held for name, purse in purses.items())
            assert all(min(purse.free, purse.out, purse.spent) >= 0 for purse in purses.values())
            spent = sum(purse.spent for purse in purses.values())
            assert budget.used_micro + spent == self.cost
            promised = sum(purse.held for purse in purses.values()) + self.trainings_held
            assert budget.used_micro + promised <= self.limits[key]

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for server in self.servers:
                server.close()
            self.database.close()
            self.runner.close()
            self.folder.cleanup()


Ledger.TestCase.settings = settings(max_examples=10, stateful_step_count=30, deadline=None)
TestLedger = Ledger.TestCase
