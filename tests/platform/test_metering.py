"""What is used is counted and charged once, however a request ends, and only who may asks a model."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gale.engine.request import Decision, Embeddings, EngineFailedError, SamplingParams
from gale.platform.access import NotAllowedError
from gale.platform.budgets import BudgetSpentError
from gale.platform.prices import Price
from gale.text.template import Message
from tests.platform.metered import ACTOR, TOTAL, bench, finish
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
