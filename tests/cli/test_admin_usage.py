"""``gale admin quota`` and ``gale admin usage`` on a database of their own."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gale.cli.admin import app
from gale.core.errors import GaleError
from gale.platform.ids import new_id
from gale.platform.store import Store
from gale.platform.usage import UsageEvent, write_events


@pytest.fixture
def db(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'gale.db'}"
    Store.open(url).close()
    return url


def admin(db: str, *arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--db", db, "--json"])
    if isinstance(result.exception, GaleError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_limits_budgets_and_prices_are_set_shown_and_lifted(db: str) -> None:
    admin(db, "quota", "limit", "--project", "proj_default", "--requests-per-minute", "60", "--concurrency", "4")
    admin(db, "quota", "limit", "--project", "proj_default", "--model", "m", "--tokens-per-minute", "1000")
    admin(db, "quota", "limit", "--project", "proj_default", "--concurrency", "none")
    made = admin(db, "quota", "budget", "12.5", "--project", "proj_default", "--period", "day")
    assert made["limit"] == "12.5"
    shown = admin(db, "quota", "show", "--project", "proj_default")
    assert [(row["what"], row["model"], row["most"]) for row in shown] == [
        ("limit: requests per minute", "all", 60),
        ("limit: tokens per minute", "m", 1000),
        ("budget: day", "all", "12.5"),
    ]
    admin(db, "quota", "budget", "none", "--project", "proj_default", "--period", "day")
    assert len(admin(db, "quota", "show", "--project", "proj_default")) == 2
    admin(db, "quota", "budget", "100")  # the organisation's own, which it cannot set over HTTP
    assert admin(db, "quota", "show") == [{"what": "budget: month", "model": "all", "most": "100", "used": "0"}]
    admin(db, "quota", "price", "all", "--prompt", "0.15", "--answer", "0.6", "--cached", "0.075")
    assert admin(db, "quota", "prices") == [{"model": "all", "prompt": "0.15", "cached": "0.075", "answer": "0.6"}]


@pytest.mark.parametrize(
    "arguments",
    [
        ("quota", "limit", "--project", "proj_default"),
        ("quota", "limit", "--project", "none", "--concurrency", "1"),
        ("quota", "limit", "--concurrency", "many"),
        ("quota", "limit", "--concurrency", "1", "--project", "a", "--key", "b"),
        ("quota", "budget", "0.0000001"),
        ("quota", "budget", "nan"),
        ("quota", "budget", "1e30"),
        ("usage", "--by", "colour"),
    ],
)
def test_what_cannot_be_set_is_said_in_words(db: str, arguments: tuple[str, ...]) -> None:
    with pytest.raises(GaleError):
        admin(db, *arguments)


def test_usage_by_day_and_model(db: str) -> None:
    now = time.time_ns() // 1000

    def event(model: str, requests: int) -> UsageEvent:
        return UsageEvent(
            new_id("usage"), now, "org_default", "proj_default", None, None, model, "completions", 0,
            requests, 10 * requests, 0, 5 * requests, 1_250_000, None,
        )  # fmt: skip

    store = Store.open(db)
    asyncio.run(store.database.write(lambda c: write_events(c, [event("a", 1), event("a", 2), event("b", 1)])))
    store.close()
    rows = admin(db, "usage", "--by", "model")
    assert [(row["model"], row["requests"], row["prompt"], row["cost"]) for row in rows] == [
        ("a", 3, 30, "2.5"),
        ("b", 1, 10, "1.25"),
    ]
    (row,) = admin(db, "usage", "--by", "project", "--days", "1")
    assert (row["project"], row["answer"]) == ("proj_default", 20)
