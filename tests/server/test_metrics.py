"""``/metrics``: what was asked, answered and used, in few series, for those who may know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gale.engine.local import LocalEngine
from gale.platform.store import Store
from tests.server.live import Live, eventually

HI: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def own(tmp_path: Path) -> Any:
    opened = Store.open(f"sqlite:///{tmp_path / 'gale.db'}")
    yield opened
    opened.close()


def read(server: Live) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, which stand in the order of their names."""
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_requests_tokens_and_times_are_counted(own: Store, launch: Callable[..., Live], engine: LocalEngine) -> None:
    server = launch(store=own, engine=engine)
    # With scores every token is told of, whether it shows or not.
    body = {"model": "tiny", "messages": HI, "max_tokens": 5, "temperature": 0, "logprobs": True}
    usage = server.http.post("/v1/chat/completions", json=body).json()["usage"]
    server.http.post("/v1/chat/completions", json={**body, "model": "none"})
    server.http.get("/no/such/../place")
    eventually(lambda: ("gale_tokens_total", "completions", "prompt") in read(server))
    samples = read(server)
    route = "/v1/chat/completions"
    assert samples["gale_requests_total", "POST", route, "200"] == 1
    assert samples["gale_requests_total", "POST", route, "404"] == 1
    assert samples["gale_requests_total", "GET", "none", "404"] == 1
    assert samples["gale_request_seconds_count", route] == 2
    assert samples["gale_tokens_total", "completions", "prompt"] == usage["prompt_tokens"]
    assert samples["gale_tokens_total", "completions", "answer"] == usage["completion_tokens"]
    assert samples["gale_first_token_seconds_count",] == 1
    assert samples["gale_token_gap_seconds_count",] == usage["completion_tokens"] - 1
    assert samples["gale_engine_running",] == samples["gale_engine_waiting",] == 0
    assert samples["gale_engine_most_cached_tokens",] > 0
    assert samples["gale_requests_in_progress",] == 1  # this one


def test_open_streams_are_counted_while_they_are_open(own: Store, launch: Callable[..., Live]) -> None:
    server = launch(store=own)
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": "endless"}], "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # which closes the answer when nobody holds it any more
        assert next(lines).startswith("data:")
        assert read(server)["gale_open_streams",] == 1
    eventually(lambda: read(server)["gale_open_streams",] == 0)
    assert ("gale_engine_running",) not in read(server), "this engine does not say"


def test_paths_that_nobody_declared_make_no_series(own: Store, launch: Callable[..., Live]) -> None:
    server = launch(store=own)
    for number in range(20):
        server.http.get(f"/v1/{number}")
        server.http.request(f"VERB{number}", f"/{number}")
    assert len([name for name in read(server) if name[0] == "gale_requests_total"]) <= 8


def test_a_proxy_on_this_machine_is_not_this_machine(own: Store, launch: Callable[..., Live]) -> None:
    server = launch(store=own)
    assert server.http.get("/metrics").status_code == 200
    assert server.http.get("/metrics", headers={"x-forwarded-for": "192.0.2.1"}).status_code == 403
