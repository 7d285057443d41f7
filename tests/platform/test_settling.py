"""What is promised of money that is out: a server that stops, an answer that is cut off twice, and what takes all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.engine.request import Event, SamplingParams
from gale.platform import purses
from gale.platform.budgets import BudgetKey, BudgetSpentError, hold
from gale.text.template import Message
from tests.platform.metered import ACTOR, PROJECT, TOTAL, bench


def test_a_server_that_stops_keeps_what_is_still_owed(database_url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(database_url, tmp_path / "usage") as b:
            await b.price()
            await b.budget(1000)
            await b.ask("one two", max_tokens=7)
            stuck = b.metering.engine(ACTOR, b.engine).chat(
                [Message(role="user", content="endless")], SamplingParams(max_tokens=50)
            )
            await anext(stuck)
            await b.metering.finish()
            budget = (await b.budgets())[TOTAL]
            assert (budget.used_micro, budget.held_micro) == (5, 52)  # what is out, and no more
            with pytest.raises(StoreError, match="stopping"):  # and nothing more is begun at its expense
                await b.ask("one two", max_tokens=7)
            await stuck.aclose()
            b.metering.close()
            other = await b.another()
            with pytest.raises(BudgetSpentError):
                await b.ask("one two", max_tokens=950, metering=other)
            assert (await b.budgets())[TOTAL].used_micro == 5 + 3  # what it owed is known by now
            for _ in range(6):
                b.clocks.seconds += purses.BEAT_S
                await other.refresh()
                await other.purses.beat()
            await b.ask("one two", max_tokens=980, metering=other)

    asyncio.run(main())


def test_an_answer_that_is_cut_off_again_while_it_ends_is_charged(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(1000)
            chat = b.engine.chat
            ending, said = asyncio.Event(), asyncio.Event()

            async def lingering(*asked: Any) -> AsyncGenerator[Event, None]:
                events = chat(*asked)
                try:
                    async for event in events:
                        yield event
                        said.set()  # it was taken
                finally:
                    ending.set()
                    await asyncio.sleep(60)

            b.engine.chat = lingering  # type: ignore[method-assign]
            answering = asyncio.create_task(b.ask("endless", max_tokens=50))
            await said.wait()
            answering.cancel()
            await ending.wait()
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await b.metering.queue.flush()
            (event,) = await b.rows("usage_events")
            assert event["input_tokens"] == 2 and event["output_tokens"] > 0
            assert b.metering.purses._purses[TOTAL].out == 0

    asyncio.run(main())


def test_who_has_nothing_left_takes_nothing_from_the_purses_of_others(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            others = BudgetKey(("project", "proj_other"), "total")
            await b.budget(1000, others)
            await b.budget(0)
            await b.metering.purses.reserve([others], 10)
            purse = b.metering.purses._purses[others]
            free = purse.free
            assert free > 0

            async def refused() -> None:
                raise BudgetSpentError("There is nothing left.")

            with pytest.raises(BudgetSpentError):
                await b.metering.with_all_that_is_free(ACTOR, refused)
            assert purse.free == free

    asyncio.run(main())


def test_what_this_process_keeps_to_itself_is_there_for_what_needs_all(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(1000)
            await b.ask("one two", max_tokens=100)
            await b.metering.queue.flush()
            assert (await b.budgets())[TOTAL].held_micro > 50

            async def take_all() -> None:
                def work(connection: Connection) -> None:
                    hold(connection, "job_1", [PROJECT], 995, b.clocks.us)

                await b.database.write(work)

            await b.metering.with_all_that_is_free(ACTOR, take_all)
            assert (await b.budgets())[TOTAL].room == 0
            with pytest.raises(BudgetSpentError):
                await b.metering.with_all_that_is_free(ACTOR, take_all)

    asyncio.run(main())
