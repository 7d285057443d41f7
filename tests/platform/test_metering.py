"""What is used is counted and charged once, however a request ends; and nobody spends more than a budget has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.engine.request import Decision, Embeddings, EngineFailedError, Event, Finished, SamplingParams
from gale.platform import purses, usage_queue
from gale.platform.access import NotAllowedError
from gale.platform.budgets import BudgetKey, BudgetSpentError, hold
from gale.platform.metering import Metering
from gale.platform.prices import Price
from gale.text.template import Message
from tests.platform.metered import ACTOR, PROJECT, TOTAL, bench, finish
from tests.server.scripted_engine import ScriptedEngine


def test_an_answer_becomes_an_event_and_a_sum_of_its_hour(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price(Price(2_000_000, 0, 3_500_000))
            await b.ask("one two three")
            await b.ask("one two three")
            await b.metering.queue.flush()
            events = await b.rows("usage_events")
            assert [event["cost_micro"] for event in events] == [4 * 2 + 11, 4 * 2 + 11]  # rounded up
            assert {event["project_id"] for event in events} == {"proj_default"}
            assert {event["api_key_id"] for event in events} == {"key_one"}
            (hour,) = await b.rows("usage_rollups")
            assert (hour["requests"], hour["input_tokens"], hour["output_tokens"]) == (2, 8, 6)
            assert hour["hour"] % 3_600_000_000 == 0

    asyncio.run(main())


def test_several_answers_to_one_request_share_its_prompt_and_make_one_event(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(requests_per_minute=1)
            engine = b.metering.engine(ACTOR, b.engine)
            messages = [Message(role="user", content="one two three")]

            async def one() -> None:
                async for _ in engine.chat(messages, SamplingParams()):
                    pass

            await asyncio.gather(*[one() for _ in range(5)])
            await b.metering.queue.flush()
            (event,) = await b.rows("usage_events")
            assert (event["requests"], event["input_tokens"], event["output_tokens"]) == (1, 4, 15)
            await finish(engine, "another question")
            await b.metering.queue.flush()
            assert sum(row["requests"] for row in await b.rows("usage_events")) == 1

    asyncio.run(main())


def test_a_client_that_leaves_pays_for_what_was_said(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(1000)
            engine = b.metering.engine(ACTOR, b.engine)
            events = engine.chat([Message(role="user", content="endless")], SamplingParams(max_tokens=50))
            for _ in range(3):
                await anext(events)
            await events.aclose()
            assert b.engine.active == 0
            await b.metering.queue.flush()
            (event,) = await b.rows("usage_events")
            assert (event["input_tokens"], event["output_tokens"], event["cost_micro"]) == (2, 3, 5)
            budget = (await b.budgets())[TOTAL]
            assert budget.used_micro == 5
            assert budget.held_micro == b.metering.purses._purses[TOTAL].free

    asyncio.run(main())


def test_what_the_engine_fails_at_costs_nothing(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(200)
            await b.limit(tokens_per_minute=100)
            for _ in range(3):
                with pytest.raises(EngineFailedError):
                    await b.ask("breaks", max_tokens=90)
            await b.ask("one", max_tokens=90)
            await b.metering.queue.flush()
            assert [event["cost_micro"] for event in await b.rows("usage_events")] == [3]

    asyncio.run(main())


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
            ending = asyncio.Event()

            async def lingering(*asked: Any) -> AsyncGenerator[Event, None]:
                events = chat(*asked)
                try:
                    async for event in events:
                        yield event
                finally:
                    ending.set()
                    await asyncio.sleep(60)

            b.engine.chat = lingering  # type: ignore[method-assign]
            answering = asyncio.create_task(b.ask("endless", max_tokens=50))
            await b.asked()
            await asyncio.sleep(0.05)
            answering.cancel()
            await ending.wait()
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await b.metering.queue.flush()
            (event,) = await b.rows("usage_events")
            assert event["input_tokens"] == 2 and event["output_tokens"] > 0
            assert b.metering.purses._purses[TOTAL].out == 0

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

            await b.metering.with_all_that_is_free(take_all)
            assert (await b.budgets())[TOTAL].room == 0
            with pytest.raises(BudgetSpentError):
                await b.metering.with_all_that_is_free(take_all)

    asyncio.run(main())


def test_models_that_an_actor_may_not_use_are_not_there(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            b.engine.adapters = ("ft:one", "ft:two", "free")
            b.metering.visible = lambda actor, name: name != "ft:two"
            engine = b.metering.engine(ACTOR, b.engine)
            assert engine.adapters == ("ft:one", "free")
            narrow = b.metering.engine(replace(ACTOR, models=frozenset({"ft:one", "ft:two"})), b.engine)
            assert narrow.adapters == ("ft:one",)
            assert narrow.names == ("ft:one",)  # type: ignore[attr-defined]
            with pytest.raises(NotAllowedError):
                await finish(narrow, "one")
            await finish(narrow, "one", adapter="ft:one")

    asyncio.run(main())


def test_a_request_without_budgets_and_limits_asks_the_database_for_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.metering.ready()

            async def fail(work: object) -> None:
                raise AssertionError("the database was asked")

            monkeypatch.setattr(b.database, "read", fail)
            monkeypatch.setattr(b.database, "write", fail)
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


def test_many_questions_of_one_request_are_each_paid_for(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.price()
            await b.budget(1000)
            reader = b.metering.engine(ACTOR, ReadingEngine())
            await reader.decide([1] * 30, ["a"])
            await reader.decide([1] * 500, ["a"])
            with pytest.raises(BudgetSpentError):
                await reader.decide([1] * 480, ["a"])
            await b.metering.queue.flush()
            (event,) = await b.rows("usage_events")
            assert (event["requests"], event["input_tokens"]) == (1, 530)
            reading = asyncio.create_task(reader.embed([[0] * 40]))  # never ends
            await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await b.metering.queue.flush()
            assert (await b.budgets())[TOTAL].used_micro == 570
            assert (await b.budgets())[TOTAL].held_micro == b.metering.purses._purses[TOTAL].free

    asyncio.run(main())


def test_a_reader_of_a_project_asks_no_model(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            with pytest.raises(NotAllowedError):
                await b.ask("one", actor=replace(ACTOR, role="reader"))
            with pytest.raises(NotAllowedError):
                await b.ask("one", actor=replace(ACTOR, scopes=frozenset({"read"})))

    asyncio.run(main())


class ReadingEngine(ScriptedEngine):
    """Reads prompts, and texts for ever."""

    embedding_size = 2

    def encode_chat(self, messages: list[Message], *, adapter: str | None = None) -> list[int]:
        raise NotImplementedError

    encode = encode_text = token_bytes = complete = encode_chat  # type: ignore[assignment]

    async def embed(self, inputs: object, **more: object) -> Embeddings:
        await asyncio.Event().wait()
        raise AssertionError

    async def decide(self, prompt: list[int], labels: object, *, adapter: str | None = None) -> Decision:
        return Decision([0.0], len(prompt))
