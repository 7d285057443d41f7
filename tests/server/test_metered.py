"""What a client is told of its limits, in the words of OpenAI's API, by every route that asks the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import Connection, select

from gale.engine.local import LocalEngine
from gale.platform import tables
from gale.platform.budgets import BudgetKey, set_budget
from gale.platform.limits import change_limits
from gale.platform.prices import Price, set_price
from gale.platform.store import Store
from gale.server.metered import duration
from tests.server.live import Live, eventually

PROJECT = ("project", "proj_default")
HI: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Store]:
    """A store of this test's own."""
    opened = Store.open(f"sqlite:///{tmp_path / 'gale.db'}")
    yield opened
    opened.close()


def write(store: Store, work: Callable[[Connection], Any]) -> None:
    asyncio.run(store.database.write(work))


def limit(store: Store, values: dict[str, int | None]) -> None:
    write(store, lambda connection: change_limits(connection, PROJECT, "", values))


def client_of(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def events_of(store: Store) -> list[dict[str, Any]]:
    query = select(tables.usage_events).order_by(tables.usage_events.c.created_at)
    rows = asyncio.run(store.database.read(lambda connection: connection.execute(query).mappings().all()))
    return [dict(row) for row in rows]


def test_durations_as_openai_writes_them() -> None:
    assert [duration(seconds) for seconds in (0, 0.12, 1, 1.54, 59.96, 60, 90.2, 3600, 86399)] == [
        "0ms", "120ms", "1s", "1.5s", "60s", "1m0s", "1m30s", "1h0m0s", "23h59m59s",
    ]  # fmt: skip


def test_a_client_without_limits_is_told_of_none(live: Live) -> None:
    raw = client_of(live).chat.completions.with_raw_response.create(model="scripted/one", messages=HI)
    assert not [name for name in raw.headers if name.startswith("x-ratelimit")]


def test_limits_of_requests_and_tokens_count_down_in_the_headers(own: Store, launch: Callable[..., Live]) -> None:
    limit(own, {"requests_per_minute": 3, "tokens_per_minute": 1000})
    client = client_of(launch(store=own))
    for left in (2, 1, 0):
        raw = client.chat.completions.with_raw_response.create(model="scripted/one", messages=HI)
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
        assert raw.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) == 1000 - (3 - left) * 7
        assert raw.headers["x-ratelimit-reset-requests"]
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="scripted/one", messages=HI, stream=stream)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
        headers = caught.value.response.headers
        assert 0 < int(headers["retry-after"]) <= 61
        assert 0 < int(headers["retry-after-ms"]) <= 61_000
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-should-retry" not in headers


def test_a_stream_tells_what_is_left_as_it_begins(own: Store, launch: Callable[..., Live]) -> None:
    limit(own, {"tokens_per_minute": 1000})
    server = launch(store=own)
    body = {"model": "scripted/one", "messages": HI, "stream": True, "max_tokens": 40}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.headers["x-ratelimit-remaining-tokens"] == str(1000 - 44)
    assert "x-ratelimit-limit-requests" not in response.headers


def test_tokens_that_can_never_be_had_are_not_asked_for_again(own: Store, launch: Callable[..., Live]) -> None:
    limit(own, {"tokens_per_minute": 10})
    with pytest.raises(openai.RateLimitError) as caught:
        client_of(launch(store=own)).chat.completions.create(model="scripted/one", messages=HI, max_tokens=50)
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "tokens")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.response.headers


def test_a_spent_budget_is_insufficient_quota(own: Store, launch: Callable[..., Live]) -> None:
    write(own, lambda connection: set_price(connection, "", Price(1_000_000, 1_000_000, 1_000_000)))
    write(own, lambda connection: set_budget(connection, BudgetKey(PROJECT, "month"), 30, 1_700_000_000_000_000))
    server = launch(store=own)
    client = client_of(server)
    client.chat.completions.create(model="scripted/one", messages=HI, max_tokens=20)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="scripted/one", messages=HI, max_tokens=20)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    client.chat.completions.create(model="scripted/one", messages=HI, max_tokens=10)
    # The page's turns are paid for by the same budget.
    conversation = server.http.post("/api/conversations", json={}).json()["id"]
    turn = server.http.post(f"/api/conversations/{conversation}/turns", json={"content": "one two three"})
    assert "insufficient_quota" in turn.text


def test_every_route_that_asks_the_engine_is_counted(
    own: Store, launch: Callable[..., Live], engine: LocalEngine
) -> None:
    server = launch(store=own, engine=engine)
    client = client_of(server)
    chat = client.chat.completions.create(model="tiny", messages=HI, max_tokens=4, n=2)
    text = client.completions.create(model="tiny", prompt=["a b", "c d e"], max_tokens=3)
    vectors = client.embeddings.create(model="tiny", input=["one two", "three"])
    answer = client.responses.create(model="tiny", input="one two", max_output_tokens=16)
    decision = server.http.post("/v1/decisions", json={"model": "tiny", "prompt": "one", "labels": ["a", "b"]}).json()[
        "usage"
    ]
    ranking = server.http.post(
        "/v1/rerank", json={"model": "tiny", "query": "one", "documents": ["one", "two", "three"]}
    ).json()["usage"]
    message = server.http.post("/v1/messages", json={"model": "tiny", "messages": HI, "max_tokens": 5}).json()["usage"]
    told = [
        (chat.usage.prompt_tokens, chat.usage.completion_tokens),  # type: ignore[union-attr]
        (text.usage.prompt_tokens, text.usage.completion_tokens),  # type: ignore[union-attr]
        (vectors.usage.prompt_tokens, 0),
        (answer.usage.input_tokens, answer.usage.output_tokens),  # type: ignore[union-attr]
        (decision["prompt_tokens"], 0),
        (ranking["prompt_tokens"], 0),
        (message["input_tokens"], message["output_tokens"]),
    ]
    eventually(lambda: len(events_of(own)) == len(told))
    events = events_of(own)
    assert [(event["input_tokens"], event["output_tokens"]) for event in events] == told
    assert {event["requests"] for event in events} == {1}
    assert [event["kind"] for event in events].count("embeddings") == 1
    assert all(event["request_id"].startswith("req_") for event in events)


def test_a_stream_that_is_left_frees_its_memory_and_pays_for_what_was_written(
    own: Store, launch: Callable[..., Live], engine: LocalEngine
) -> None:
    server = launch(store=own, engine=engine)
    body = {"model": "tiny", "messages": HI, "stream": True, "temperature": 0, "logit_bias": {}, "max_tokens": 400}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        for _ in itertools.islice(response.iter_lines(), 8):
            pass
    eventually(lambda: engine.stats().running == 0 and engine.stats().cached_tokens == 0)
    eventually(lambda: len(events_of(own)) == 1)
    (event,) = events_of(own)
    prompt = engine.count_prompt_tokens(HI)
    assert event["input_tokens"] == prompt
    assert 0 < event["output_tokens"] < 400


def test_a_model_that_a_key_may_not_use_is_not_there(own: Store, launch: Callable[..., Live]) -> None:
    own.metering.visible = lambda actor, name: False
    client = client_of(launch(store=own))
    assert [model.id for model in client.models.list()] == []
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="scripted/one", messages=HI)
    assert caught.value.code == "model_not_found"
