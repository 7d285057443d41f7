"""Nobody spends more than a budget has, however many ask at once, on however many servers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gale.engine.request import Finished
from gale.platform import purses
from gale.platform.budgets import BudgetKey, BudgetSpentError
from gale.platform.metering import Metering
from tests.platform.metered import ACTOR, PROJECT, TOTAL, bench


def test_a_hundred_calls_at_the_edge_of_a_budget_spend_what_it_has_and_no_more(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            # An answer costs 3 for the prompt and 7 for what is said; 37 of a hundred can be paid.
            await b.budget(375)
            done = await asyncio.gather(*[b.ask("one two", max_tokens=7) for _ in range(100)], return_exceptions=True)
            refused = [each for each in done if isinstance(each, BudgetSpentError)]
            answered = [each for each in done if isinstance(each, Finished)]
            assert len(refused) + len(answered) == 100
            assert answered and refused
            await b.metering.queue.flush()
            budget = (await b.budgets())[TOTAL]
            assert budget.used_micro == 5 * len(answered)
            assert budget.used_micro + budget.held_micro <= 375
            # What the first ones gave back is there for others: in the end nobody could be paid any more.
            while True:
                try:
                    await b.ask("one two", max_tokens=7)
                except BudgetSpentError:
                    b.clocks.seconds += 2  # a refusal is remembered for a second
                    purse = b.metering.purses._purses[TOTAL]
                    if purse.free < 10:
                        break
            await b.metering.queue.flush()
            budget = (await b.budgets())[TOTAL]
            assert 375 - 10 < budget.used_micro <= 375

    asyncio.run(main())


def test_every_budget_that_a_request_is_under_is_kept_to(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(1000, BudgetKey(("organisation", "org_default"), "month"))
            await b.budget(1000, TOTAL)
            await b.budget(20, BudgetKey(("key", "key_one"), "day"))
            await b.ask("one two", max_tokens=7)
            await b.ask("one two", max_tokens=7)
            with pytest.raises(BudgetSpentError, match="daily budget of key key_one"):
                await b.ask("one two", max_tokens=18)
            await b.ask("one two", max_tokens=18, actor=replace(ACTOR, key_id="key_two"))
            await b.metering.queue.flush()
            used = {key.scope[0]: budget.used_micro for key, budget in (await b.budgets()).items()}
            assert used == {"organisation": 15, "project": 15, "key": 10}
            # Nothing of what the refused one had set aside elsewhere is still out.
            assert all(purse.out == 0 for purse in b.metering.purses._purses.values())

    asyncio.run(main())


def test_two_servers_share_a_budget_without_overspending_it(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(300)
            other = await b.another()
            done = await asyncio.gather(
                *[
                    b.ask("one two", max_tokens=7, metering=metering)
                    for metering in (b.metering, other)
                    for _ in range(60)
                ],
                return_exceptions=True,
            )
            await b.metering.queue.flush()
            await other.queue.flush()
            answered = sum(isinstance(each, Finished) for each in done)
            budget = (await b.budgets())[TOTAL]
            assert budget.used_micro == 5 * answered
            assert budget.used_micro + budget.held_micro <= 300
            assert {type(each) for each in done} == {Finished, BudgetSpentError}

    asyncio.run(main())


def test_what_a_killed_server_held_is_free_again_when_it_has_not_been_heard_of_for_long(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(100)
            dead = await b.another()
            await b.ask("one two", max_tokens=90, metering=dead)
            assert (await b.budgets())[TOTAL].held_micro > 0
            with pytest.raises(BudgetSpentError):
                await b.ask("one two", max_tokens=97)
            for _ in range(6):  # the living one goes on
                b.clocks.seconds += purses.BEAT_S
                await b.metering.refresh()
                await b.metering.purses.beat()
            await b.ask("one two", max_tokens=97)
            assert len(await b.rows("processes")) == 1

    asyncio.run(main())


def test_a_server_that_was_taken_for_dead_gives_no_more_out_of_what_it_had(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(100)
            asleep = await b.another()
            await b.ask("one two", max_tokens=80, metering=asleep)
            await asleep.queue.flush()
            await b.metering.ready()
            for _ in range(6):
                b.clocks.seconds += purses.BEAT_S
                await b.metering.refresh()
                await b.metering.purses.beat()
            await b.ask("one two", max_tokens=90)
            with pytest.raises(BudgetSpentError):  # its own block has been given away
                await b.ask("one two", max_tokens=90, metering=asleep)
            await b.metering.queue.flush()
            budget = (await b.budgets())[TOTAL]
            assert budget.used_micro == 10
            assert budget.used_micro + budget.held_micro <= 100

    asyncio.run(main())


def test_a_server_that_is_alone_frees_at_once_what_its_killed_one_held(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(100)
            await b.ask("one two", max_tokens=90)
            fresh = Metering(b.database, alone=True, clock=b.clocks.monotonic, now_us=b.clocks.now_us)
            await b.ask("one two", max_tokens=97, metering=fresh)
            assert fresh.purses.living == 1

    asyncio.run(main())


def test_a_day_s_budget_begins_anew_at_midnight_in_utc_and_not_when_the_clock_is_set_back(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            day = BudgetKey(PROJECT, "day")
            midnight = 1_700_006_400_000_000
            assert midnight % 86_400_000_000 == 0
            b.clocks.us = midnight - 1
            await b.price()
            await b.budget(12, day)
            await b.ask("one two", max_tokens=7)
            with pytest.raises(BudgetSpentError):
                await b.ask("one two", max_tokens=9)
            await b.metering.queue.flush()
            b.clocks.us = midnight
            b.clocks.seconds += 2
            await b.ask("one two", max_tokens=7)
            await b.metering.queue.flush()
            assert (await b.budgets())[day].used_micro == 5
            b.clocks.us -= 3_600_000_000  # an hour back, and midnight once more
            assert (await b.budgets())[day].used_micro == 5
            b.clocks.us = midnight + 1
            assert (await b.budgets())[day].used_micro == 5

    asyncio.run(main())


def test_what_costs_nothing_needs_no_budget(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.budget(0)
            await b.ask("one two")

    asyncio.run(main())


def test_a_request_with_a_budget_waits_for_the_database_only_where_its_block_is_too_small(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(100_000)
            await b.ask("one two", max_tokens=7)

            async def fail(work: object) -> None:
                raise AssertionError("the database was asked")

            monkeypatch.setattr(b.database, "read", fail)
            monkeypatch.setattr(b.database, "write", fail)
            for _ in range(100):
                await b.ask("one two", max_tokens=7)

    asyncio.run(main())
