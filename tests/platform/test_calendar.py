"""Days and months of budgets and usage: in UTC, without gap or overlap, through leap days and every change of time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gale.platform.budgets import Period, period_began

FIRST, LAST = datetime(2000, 1, 1), datetime(2199, 12, 31)
moments = st.datetimes(FIRST, LAST, timezones=st.just(UTC))


def us(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


@given(moments)
@example(datetime(2028, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC))
@example(datetime(2100, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC))
@example(datetime(2027, 3, 28, 1, 30, tzinfo=UTC))  # when clocks go forward in Europe
@example(datetime(2027, 10, 31, 1, 0, tzinfo=UTC))
@example(datetime(2199, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
def test_a_moment_lies_in_its_own_day_and_month(moment: datetime) -> None:
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    assert period_began("day", us(moment)) == us(day)
    assert period_began("month", us(moment)) == us(day.replace(day=1))
    assert period_began("total", us(moment)) == 0


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Shanghai", "America/St_Johns", "Pacific/Apia"])
@given(moment=moments, period=st.sampled_from(["day", "month"]))
def test_where_the_server_stands_makes_no_difference(zone: str, moment: datetime, period: Period) -> None:
    import os
    import time

    expected, before = period_began(period, us(moment)), os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        assert period_began(period, us(moment)) == expected
    finally:
        os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
        time.tzset()
