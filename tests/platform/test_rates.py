"""Rate limits: no window of a minute or a day ever has more in it than its limit, whatever clocks are set to."""

from __future__ import annotations

import asyncio
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gale.platform.limits import Limit, LimitExceededError
from gale.platform.metering import Metering
from gale.platform.rates import Rates
from gale.platform.windows import Window
from tests.platform.metered import ACTOR, PROJECT, bench, finish


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 10)), max_size=60),
    st.integers(10, 20),
)
def test_no_window_has_more_in_it_than_its_limit(steps: list[tuple[float, int]], limit: int) -> None:
    window, now, taken = Window(60.0), 5.0, []
    for wait, amount in steps:
        now += wait
        wait_s = window.wait_s(limit - amount, now)
        if wait_s == 0:
            window.take(amount, now)
            taken.append((now, amount))
        else:  # what is said of the time to wait is true
            assert deepcopy(window).wait_s(limit - amount, now + wait_s + 1e-6) == 0
        assert sum(amount for at, amount in taken if at > now - 60.0) <= window.used(now) <= limit
        assert deepcopy(window).used(now + window.reset_s(now) + 1e-6) == 0


def test_what_is_given_back_can_be_taken_again_and_not_twice() -> None:
    window = Window(60.0)
    window.take(10, 0.0)
    window.give_back(4, 0.0)
    assert window.used(1.0) == 6
    window.give_back(100, 0.0)
    assert window.used(1.0) == 0
    window.take(5, 100.0)
    window.give_back(5, 0.0)  # long gone
    assert window.used(100.0) == 5


def test_a_refused_request_takes_nothing_from_any_limit() -> None:
    rates = Rates(lambda: 7.0)
    wide, narrow = Limit(PROJECT, "", requests_per_minute=9), Limit(PROJECT, "m", requests_per_minute=1)
    rates.load([wide, narrow])
    limits = rates.of([PROJECT], "m")
    assert set(limits) == {wide, narrow}
    assert rates.of([PROJECT], "other") == (wide,)
    rates.enter(limits)
    for _ in range(3):
        with pytest.raises(LimitExceededError) as caught:
            rates.enter(limits)
        assert caught.value.measure == "requests"
        assert caught.value.wait_s is not None and 0 < caught.value.wait_s <= 61
    assert rates.state((wide,), "requests").remaining == 8  # type: ignore[union-attr]


def test_several_servers_keep_to_a_limit_together() -> None:
    rates = Rates(lambda: 7.0)
    rates.load([Limit(PROJECT, "", requests_per_minute=10)])
    rates.processes = 3
    limits = rates.of([PROJECT], "m")
    for _ in range(4):  # a third, rounded up
        rates.enter(limits)
    with pytest.raises(LimitExceededError):
        rates.enter(limits)


def test_requests_per_minute_and_day_count_requests_and_not_answers(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(requests_per_minute=2, requests_per_day=3)
            for _ in range(2):
                await b.ask("one two")
            with pytest.raises(LimitExceededError):
                await b.ask("one two")
            b.clocks.seconds += 62
            await b.ask("one two")
            with pytest.raises(LimitExceededError) as caught:
                await b.ask("one two")
            assert caught.value.wait_s is not None and caught.value.wait_s > 3600
            b.clocks.us += 48 * 3_600_000_000  # somebody sets the clock
            with pytest.raises(LimitExceededError):
                await b.ask("one two")

    asyncio.run(main())


def test_tokens_are_set_aside_and_what_was_not_used_is_given_back(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(tokens_per_minute=40)
            await b.ask("one two three", max_tokens=30)  # a prompt of 4 and an answer of 3
            await b.ask("one two three", max_tokens=29)  # 7 are used
            with pytest.raises(LimitExceededError) as caught:
                await b.ask("one two three", max_tokens=23)
            assert caught.value.measure == "tokens"
            await b.ask("one two three", max_tokens=22)
            with pytest.raises(LimitExceededError) as caught:
                await b.ask("one two three", max_tokens=37)
            assert caught.value.wait_s is None, "no wait makes it pass"

    asyncio.run(main())


def test_an_answer_without_a_length_may_pass_and_is_counted_whole(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(tokens_per_minute=40)
            await b.ask("word " * 30)
            with pytest.raises(LimitExceededError):
                await b.ask("one")

    asyncio.run(main())


def test_requests_at_once_are_limited_and_end_with_their_answers(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(concurrency=1)
            waiting = asyncio.create_task(b.ask("silent"))
            await b.asked()
            with pytest.raises(LimitExceededError):
                await b.ask("one")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await b.ask("one")

    asyncio.run(main())


def test_a_batch_has_no_rate_limits(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(requests_per_minute=1, tokens_per_minute=1, concurrency=1)
            for _ in range(3):
                await b.ask("one two three", batch=True)

    asyncio.run(main())


def test_a_limit_that_is_lifted_limits_no_more(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(requests_per_minute=1)
            await b.ask("one")
            with pytest.raises(LimitExceededError):
                await b.ask("one")
            await b.limit(requests_per_minute=None)
            await b.ask("one")
            assert await b.rows("limits") == []

    asyncio.run(main())


def test_what_was_asked_before_a_restart_counts_for_the_day(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(requests_per_day=3)
            await b.ask("one")
            await b.ask("one")
            await b.ask("one", batch=True)
            await b.metering.queue.flush()
            fresh = Metering(b.database, alone=True, clock=b.clocks.monotonic, now_us=b.clocks.now_us)
            await b.ask("one", metering=fresh)
            with pytest.raises(LimitExceededError):
                await b.ask("one", metering=fresh)
            await fresh.refresh()  # and is not counted twice
            b.clocks.seconds += 26 * 3600
            await b.ask("one", metering=fresh)

    asyncio.run(main())


def test_all_choices_of_a_refused_request_are_refused(database_url: str) -> None:
    async def main() -> None:
        async with bench(database_url) as b:
            await b.limit(requests_per_minute=0)
            engine = b.metering.engine(ACTOR, b.engine)
            done = await asyncio.gather(*[finish(engine, "one") for _ in range(3)], return_exceptions=True)
            assert {type(each) for each in done} == {LimitExceededError}

    asyncio.run(main())
