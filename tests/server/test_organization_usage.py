"""Usage, costs, limits and budgets as the official client reads and sets them, and nothing of another organisation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import Connection, insert

from gale.platform import tables
from gale.platform.budgets import BudgetKey, set_budget
from gale.platform.ids import new_id
from gale.platform.store import Store
from gale.platform.usage import UsageEvent, write_events
from gale.server.organization_quotas import NO_LIMIT
from tests.server.live import Live

HOUR_S = 3600
DAY = (int(time.time()) // (24 * HOUR_S) - 10) * 24 * HOUR_S  # a midnight in UTC, whose usage is still kept
MESSAGES: Any = [{"role": "user", "content": "one two three"}]


def event(at_s: int, **values: Any) -> UsageEvent:
    fields: dict[str, Any] = {
        "id": new_id("usage"),
        "created_at": at_s * 1_000_000,
        "organisation_id": "org_default",
        "project_id": "proj_default",
        "user_id": "user_first",
        "api_key_id": None,
        "model": "a",
        "kind": "completions",
        "batch": 0,
        "requests": 1,
        "input_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 5,
        "cost_micro": 1_500_000,
        "request_id": None,
    }
    return UsageEvent(**{**fields, **values})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Store]:
    """A store with usage of two days, and some of another organisation."""
    opened = Store.open(f"sqlite:///{tmp_path / 'gale.db'}")
    events = [
        event(DAY + 10),
        event(DAY + 70, model="b", api_key_id="key_one", user_id=None),
        event(DAY + HOUR_S, batch=1),
        event(DAY + 24 * HOUR_S),
        event(DAY + 25 * HOUR_S, kind="embeddings", output_tokens=0, cost_micro=250_000),
        event(DAY + 10, organisation_id="org_other", project_id="proj_other"),
    ]
    asyncio.run(opened.database.write(lambda connection: write_events(connection, events)))
    yield opened
    opened.close()


@pytest.fixture
def server(own: Store, launch: Callable[..., Live]) -> Live:
    return launch(store=own)


@pytest.fixture
def organization(server: Live) -> Any:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", admin_api_key="any", max_retries=0)
    return client.admin.organization


def test_usage_day_by_day(organization: Any) -> None:
    page = organization.usage.completions(start_time=DAY, end_time=DAY + 3 * 24 * HOUR_S)
    assert [(bucket.start_time, bucket.end_time) for bucket in page.data] == [
        (DAY + day * 24 * HOUR_S, DAY + (day + 1) * 24 * HOUR_S) for day in range(3)
    ]
    (first,), (second,), third = [bucket.results for bucket in page.data]
    assert (first.num_model_requests, first.input_tokens, first.output_tokens) == (3, 30, 15)
    assert (first.input_cached_tokens, first.project_id, first.batch) == (12, None, None)
    assert (second.num_model_requests, third, page.has_more, page.next_page) == (1, [], False, None)


def test_usage_is_kept_apart_and_narrowed_as_asked(organization: Any) -> None:
    def usage(**asked: Any) -> list[Any]:
        page = organization.usage.completions(start_time=DAY, end_time=DAY + 24 * HOUR_S, **asked)
        return list(page.data[0].results)

    by_model = usage(group_by=["model", "api_key_id"])
    assert [(each.model, each.api_key_id, each.num_model_requests) for each in by_model] == [
        ("a", None, 2),
        ("b", "key_one", 1),
    ]
    assert [(each.batch, each.num_model_requests) for each in usage(group_by=["batch"])] == [(False, 2), (True, 1)]
    assert [each.num_model_requests for each in usage(models=["b"])] == [1]
    assert [each.num_model_requests for each in usage(batch=True)] == [1]
    assert usage(project_ids=["proj_other"]) == usage(models=["c", "d"]) == []


def test_usage_minute_by_minute_and_hour_by_hour(organization: Any) -> None:
    minutes = organization.usage.completions(start_time=DAY + 5, end_time=DAY + 120, bucket_width="1m")
    assert [[each.num_model_requests for each in bucket.results] for bucket in minutes.data] == [[1], [1]]
    hours = organization.usage.completions(start_time=DAY, end_time=DAY + 2 * HOUR_S, bucket_width="1h")
    assert [[each.num_model_requests for each in bucket.results] for bucket in hours.data] == [[2], [1]]


def test_minutes_that_are_not_kept_any_more_are_refused_and_their_hours_told(
    server: Live, own: Store, organization: Any
) -> None:
    old = DAY - 500 * 24 * HOUR_S
    asyncio.run(own.database.write(lambda connection: write_events(connection, [event(old)])))
    asyncio.run(own.sweep())
    refused = server.http.get(f"/v1/organization/usage/completions?start_time={old}&bucket_width=1m")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "start_time"
    assert "400 days" in refused.json()["error"]["message"]
    hours = organization.usage.completions(start_time=old, end_time=old + HOUR_S, bucket_width="1h")
    assert [[each.num_model_requests for each in bucket.results] for bucket in hours.data] == [[1]]
    costs = organization.usage.costs(start_time=old, end_time=old + 24 * HOUR_S)
    assert costs.data[0].results[0].amount.value == 1.5


def test_usage_page_by_page(organization: Any) -> None:
    first = organization.usage.completions(start_time=DAY, end_time=DAY + 48 * HOUR_S, limit=1)
    assert (len(first.data), first.has_more) == (1, True)
    second = organization.usage.completions(start_time=DAY, end_time=DAY + 48 * HOUR_S, limit=1, page=first.next_page)
    assert (second.data[0].start_time, second.has_more) == (DAY + 24 * HOUR_S, False)


def test_embeddings_and_moderations_have_usage_of_their_own(organization: Any) -> None:
    page = organization.usage.embeddings(start_time=DAY, end_time=DAY + 48 * HOUR_S)
    assert [[each.input_tokens for each in bucket.results] for bucket in page.data] == [[], [10]]
    page = organization.usage.moderations(start_time=DAY, end_time=DAY + 48 * HOUR_S)
    assert all(bucket.results == [] for bucket in page.data)


def test_costs(organization: Any) -> None:
    page = organization.usage.costs(start_time=DAY, end_time=DAY + 48 * HOUR_S, group_by=["line_item"])
    bills = [[(each.line_item, each.amount.value, each.amount.currency) for each in each.results] for each in page.data]
    assert bills == [
        [("a, completions", 3.0, "usd"), ("b, completions", 1.5, "usd")],
        [("a, completions", 1.5, "usd"), ("a, embeddings", 0.25, "usd")],
    ]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=x", "start_time"),
        ("start_time=-1", "start_time"),
        ("start_time=99999999999999", "start_time"),
        (f"start_time={DAY}&limit=32", "limit"),
        (f"start_time={DAY}&limit=0", "limit"),
        (f"start_time={DAY}&bucket_width=1w", "bucket_width"),
        (f"start_time={DAY}&group_by=service_tier", "group_by"),
        (f"start_time={DAY}&batch=yes", "batch"),
        (f"start_time={DAY}&colour=red", "colour"),
        (f"start_time={DAY}&models=%00", "models"),
    ],
)
def test_what_cannot_be_asked(server: Live, query: str, param: str) -> None:
    response = server.http.get(f"/v1/organization/usage/completions?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_rate_limits_are_listed_set_kept_to_and_lifted(server: Live, organization: Any) -> None:
    limits = organization.projects.rate_limits
    listed = limits.list_rate_limits("proj_default").data
    assert [(each.id, each.model, each.max_requests_per_1_minute) for each in listed] == [
        ("rl-*", "*", NO_LIMIT),
        ("rl-scripted/one", "scripted/one", NO_LIMIT),
    ]
    changed = limits.update_rate_limit("rl-scripted/one", project_id="proj_default", max_requests_per_1_minute=1)
    assert (changed.object, changed.max_requests_per_1_minute) == ("project.rate_limit", 1)
    assert limits.list_rate_limits("proj_default").data[1].max_requests_per_1_minute == 1
    body = {"model": "scripted/one", "messages": MESSAGES}
    codes = [server.http.post("/v1/chat/completions", json=body).status_code for _ in range(2)]
    assert codes == [200, 429]
    path = "/v1/organization/projects/proj_default/rate_limits/rl-scripted/one"
    assert server.http.post(path, json={"max_requests_per_1_minute": None}).status_code == 200
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    refused = server.http.post(path, json={"max_images_per_1_minute": 4}).json()["error"]
    assert refused["param"] == "max_images_per_1_minute"
    for missing in ("rl-none", "none", "rl-"):
        response = server.http.post(f"/v1/organization/projects/proj_default/rate_limits/{missing}", json={})
        assert response.status_code == 404
    assert server.http.post(path, json={"max_requests_per_1_minute": -1}).status_code == 400


def test_budgets_are_made_changed_and_removed(server: Live) -> None:
    asked = {"scope": "project", "scope_id": "proj_default", "period": "month", "limit_micro": 2_500_000}
    made = server.http.post("/v1/organization/budgets", json=asked).json()
    assert {**made, **asked} == made
    assert (made["used_micro"], made["held_micro"], made["currency"]) == (0, 0, "usd")
    server.http.post("/v1/organization/budgets", json={**asked, "limit_micro": 5})
    (listed,) = server.http.get("/v1/organization/budgets").json()["data"]
    assert (listed["id"], listed["limit_micro"]) == (made["id"], 5)
    assert server.http.delete(f"/v1/organization/budgets/{made['id']}").json()["deleted"] is True
    assert server.http.delete(f"/v1/organization/budgets/{made['id']}").status_code == 404
    assert server.http.get("/v1/organization/budgets").json()["data"] == []


def test_an_organisation_cannot_raise_its_own_budget(server: Live) -> None:
    asked = {"scope": "organization", "scope_id": "org_default", "period": "month", "limit_micro": 2**60}
    response = server.http.post("/v1/organization/budgets", json=asked)
    assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


def test_another_organisation_s_limits_and_budgets_are_not_there(own: Store, server: Live) -> None:
    def another(connection: Connection) -> None:
        connection.execute(insert(tables.organisations).values(id="org_other", name="Other", created_at=1))
        row = {"id": "proj_other", "organisation_id": "org_other", "name": "Other", "created_at": 1}
        connection.execute(insert(tables.projects).values(**row))
        set_budget(connection, BudgetKey(("project", "proj_other"), "day"), 5, 1)

    asyncio.run(own.database.write(another))
    assert server.http.get("/v1/organization/budgets").json()["data"] == []
    asked = {"scope": "project", "scope_id": "proj_other", "period": "day", "limit_micro": 9}
    assert server.http.post("/v1/organization/budgets", json=asked).status_code == 404
    assert server.http.delete("/v1/organization/budgets/project:proj_other:day").status_code == 404
    path = "/v1/organization/projects/proj_other/rate_limits"
    assert server.http.get(path).status_code == 404
    assert server.http.post(f"{path}/rl-scripted/one", json={}).status_code == 404


def test_changes_stand_in_the_audit_log(own: Store, server: Live) -> None:
    from gale.platform.access import LOCAL_OWNER
    from gale.platform.audit import AuditFilter

    server.http.post("/v1/organization/projects/proj_default/rate_limits/rl-*", json={"max_tokens_per_1_minute": 1000})
    asked = {"scope": "project", "scope_id": "proj_default", "period": "day", "limit_micro": 9}
    server.http.post("/v1/organization/budgets", json=asked)
    found = asyncio.run(own.audit_log(LOCAL_OWNER).page(AuditFilter()))
    assert [each.type for each in found.items] == ["budget.updated", "rate_limit.updated"]
    assert found.items[1].details["changes_requested"] == {"tokens_per_minute": 1000}
