"""Usage gets into the database once, whatever happens to the database or the server meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from gale.core.errors import StoreError
from gale.platform import usage_queue
from tests.platform.metered import TOTAL, bench


def test_usage_that_the_database_does_not_take_is_written_when_it_does(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with bench(database_url, tmp_path / "usage") as b:
            await b.price()
            await b.budget(1000)
            await b.ask("one two", max_tokens=7)

            async def refuse(work: object) -> None:
                raise StoreError("The disk is full.")

            with monkeypatch.context() as broken:
                broken.setattr(b.database, "write", refuse)
                for _ in range(3):
                    with pytest.raises(StoreError):
                        await b.metering.queue.flush()
                assert b.metering.queue.waiting == 1
                assert b.metering.queue.failing
                await b.ask("one two", max_tokens=7)  # there is enough in the block
                assert b.metering.queue.waiting == 2
            await b.metering.queue.flush()
            assert len(await b.rows("usage_events")) == 2
            assert (await b.budgets())[TOTAL].used_micro == 10
            assert list((tmp_path / "usage").iterdir()) == []

    asyncio.run(main())


def test_too_much_that_waits_stops_what_costs_a_budget_and_nothing_else(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(usage_queue, "MOST_EVENTS", 4)
        monkeypatch.setattr(usage_queue, "_SEGMENT_EVENTS", 2)
        async with bench(database_url, tmp_path / "usage") as b:
            await b.price()
            await b.ask("one")

            async def refuse(work: object) -> None:
                raise StoreError("The disk is full.")

            with monkeypatch.context() as broken:
                broken.setattr(b.database, "write", refuse)
                for _ in range(12):
                    await b.ask("one")
                    with pytest.raises(StoreError):
                        await b.metering.queue.flush()
                assert b.metering.queue.in_memory <= 5
                assert b.metering.queue.waiting == 13
            await b.budget(1000)
            with pytest.raises(StoreError, match="Usage cannot be written"):
                await b.ask("one")
            await b.metering.queue.flush()
            await b.ask("one")
            await b.metering.queue.flush()
            assert sum(event["requests"] for event in await b.rows("usage_events")) == 14
            assert b.metering.queue.lost == 0

    asyncio.run(main())


def test_a_write_that_succeeded_without_our_knowing_is_not_counted_twice(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(1000)
            await b.ask("one two", max_tokens=7)
            write = b.database.write

            async def forget(work: object) -> None:
                await write(work)  # type: ignore[arg-type]
                raise StoreError("The connection was lost.")

            with monkeypatch.context() as broken:
                broken.setattr(b.database, "write", forget)
                with pytest.raises(StoreError):
                    await b.metering.queue.flush()
            await b.metering.queue.flush()
            assert len(await b.rows("usage_events")) == 1
            budget = (await b.budgets())[TOTAL]
            assert budget.used_micro == 5
            assert budget.held_micro == b.metering.purses._purses[TOTAL].held

    asyncio.run(main())


def test_the_usage_of_a_killed_server_is_written_at_the_next_start_once(database_url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(database_url, tmp_path / "usage") as b:
            await b.price()
            await b.budget(1000)
            await b.ask("one two", max_tokens=7)
            await b.ask("three four five", max_tokens=7)
            (path,) = (tmp_path / "usage").iterdir()
            with path.open("ab") as file:
                file.write(b'{"id":"half a li')  # killed in the middle of a write
            b.metering.close()
            for _ in range(2):  # started again, and killed, and started
                fresh = await b.another()
                await fresh.queue.replay()
                fresh.close()
            assert len(await b.rows("usage_events")) == 2
            assert (await b.budgets())[TOTAL].used_micro == 5 + 7
            assert list((tmp_path / "usage").iterdir()) == []

    asyncio.run(main())


def test_the_usage_of_a_living_server_is_left_to_it(database_url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(database_url, tmp_path / "usage") as b:
            await b.ask("one two")
            await (await b.another()).queue.replay()
            assert await b.rows("usage_events") == []
            assert len(os.listdir(tmp_path / "usage")) == 1  # noqa: PTH208

    asyncio.run(main())


def test_a_server_that_stops_writes_what_it_has_and_gives_back_what_it_holds(database_url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(database_url, tmp_path / "usage") as b:
            await b.price()
            await b.budget(1000)
            running = asyncio.create_task(b.metering.run())
            await b.ask("one two", max_tokens=7)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            budget = (await b.budgets())[TOTAL]
            assert (budget.used_micro, budget.held_micro) == (5, 0)
            assert await b.rows("holds") == await b.rows("processes") == []

    asyncio.run(main())
