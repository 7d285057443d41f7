"""A fine-tuning job holds what it may cost before it trains, and is charged once for what it did, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select

from gale.core.settings import settings
from gale.platform import tables
from gale.platform.access import LOCAL_OWNER, Actor
from gale.platform.audit import AuditFilter
from gale.platform.budgets import Budget, BudgetKey, BudgetSpentError, read_budgets, set_budget
from gale.platform.clock import now_us
from gale.platform.errors import ConflictError, LeaseLostError
from gale.platform.fine_tuning import KIND, Asked
from gale.platform.jobs import Job
from gale.platform.limits import LimitExceededError
from gale.platform.metering import Metering
from gale.platform.prices import Price, set_price
from gale.platform.store import Store
from gale.platform.tuning_bill import MOST, PRICE, SO_FAR, read_price, set_aside, settle
from tests.platform.rows import run

MONTH = BudgetKey(("organisation", "org_default"), "month")
TOTAL = BudgetKey(("project", "proj_default"), "total")
ALL = {MONTH: 10_000, TOTAL: 10_000}
# A trained token costs two micro-units.
PRICES = Price(2_000_000, 1, 9_000_000)


@pytest.fixture
def store(database_url: str, tmp_path: Path, gale_home: Path) -> Iterator[Store]:
    opened = Store.open(database_url, files=tmp_path / "files")
    run(opened.database.write(lambda connection: set_price(connection, "base", PRICES)))
    yield opened
    opened.close()


def limit(store: Store, limits: dict[BudgetKey, int]) -> None:
    for key, most in limits.items():
        run(store.database.write(lambda connection, key=key, most=most: set_budget(connection, key, most, now_us())))  # type: ignore[misc]
    run(store.metering.refresh())


def budgets(store: Store) -> dict[BudgetKey, Budget]:
    found = run(store.database.read(lambda connection: read_budgets(connection, now_us())))
    return {budget.key: budget for budget in found}


def state_of(store: Store) -> set[tuple[int, int]]:
    """What is used and held of every budget."""
    return {(budget.used_micro, budget.held_micro) for budget in budgets(store).values()}


def events(store: Store) -> list[dict[str, Any]]:
    def work(connection: Connection) -> list[dict[str, Any]]:
        return [dict(row) for row in connection.execute(select(tables.usage_events)).mappings()]

    return run(store.database.read(work))


def file_of(store: Store, actor: Actor) -> str:
    async def keep() -> str:
        files = store.files(actor)
        with files.folder.incoming(100) as incoming:
            incoming.write(b"{}\n")
            return (await files.keep(incoming, filename="a.jsonl", purpose="fine-tune")).id

    return run(keep())


def create(store: Store, actor: Actor = LOCAL_OWNER) -> Job:
    file_id = file_of(store, actor)
    asked = Asked("base", "base", "/", None, file_id, None, "supervised", {}, None, 1, None, {})
    return run(store.fine_tuning(actor).create(asked))


def queued(store: Store, most: int, actor: Actor = LOCAL_OWNER) -> Job:
    """A job of at most ``most`` tokens as its validation leaves it, in a worker's hands."""
    create(store, actor)
    job = run(store.jobs.claim({KIND: ("validating_files",)}, "one", 60))
    assert job is not None
    price = run(store.database.read(lambda connection: read_price(connection, "base")))
    found = {"examples": {}, MOST: most, PRICE: price}
    return run(store.jobs.move(job, ("validating_files",), "queued", found, set_aside))


def test_a_job_holds_the_most_that_it_may_cost_in_every_budget_and_is_charged_what_it_did(store: Store) -> None:
    limit(store, ALL)
    job = queued(store, 1000)
    assert state_of(store) == {(0, 2000)}
    done = run(store.jobs.move(job, ("queued",), "succeeded", {}, lambda c, moved: settle(c, moved, 700)))
    assert state_of(store) == {(1400, 0)}
    (event,) = events(store)
    assert (event["kind"], event["model"], event["input_tokens"], event["cost_micro"], event["request_id"]) == (
        "fine_tuning", "base", 700, 1400, job.id,
    )  # fmt: skip
    # Whoever comes late, or again, charges nothing.
    for worker in (job, done):
        with pytest.raises((LeaseLostError, ConflictError)):
            run(store.jobs.move(worker, ("queued",), "succeeded", {}, lambda c, moved: settle(c, moved, 700)))
    with pytest.raises(ConflictError):
        run(store.fine_tuning(LOCAL_OWNER).cancel(job.id))
    assert state_of(store) == {(1400, 0)} and len(events(store)) == 1


def test_a_job_that_one_budget_has_no_room_for_holds_nothing_anywhere(store: Store) -> None:
    limit(store, {MONTH: 1999, TOTAL: 10_000})
    with pytest.raises(BudgetSpentError, match=r"monthly budget of organisation org_default .* up to 0.002 where"):
        queued(store, 1000)
    assert state_of(store) == {(0, 0)}
    job = run(store.fine_tuning(LOCAL_OWNER).page(limit=1, after=None)).items[0]
    assert (job.state, job.result) == ("validating_files", {})


def test_of_jobs_at_the_edge_of_a_budget_only_those_begin_that_it_can_pay(store: Store) -> None:
    limit(store, {TOTAL: 5000})
    held = 0
    for _ in range(4):
        try:
            queued(store, 1000)
            held += 1
        except BudgetSpentError:
            continue
    assert held == 2 and state_of(store) == {(0, 4000)}


def test_a_job_that_is_cancelled_pays_for_the_steps_that_were_done(store: Store) -> None:
    limit(store, ALL)
    job = queued(store, 1000)
    run(store.jobs.record(job, {SO_FAR: 30}))
    tuning = store.fine_tuning(LOCAL_OWNER)
    paused = run(tuning.pause(job.id))
    assert paused.state == "paused" and state_of(store) == {(0, 2000)}  # it may go on at any time
    assert run(tuning.resume(job.id)).state == "queued"
    ended = run(tuning.cancel(job.id))
    assert ended.result["finished_at"] > 0
    assert state_of(store) == {(60, 0)} and [each["cost_micro"] for each in events(store)] == [60]
    assert run(store.jobs.get(LOCAL_OWNER, KIND, job.id)).state == "cancelled"
    # One that never trained costs nothing.
    run(tuning.cancel(create(store).id))
    assert state_of(store) == {(60, 0)} and len(events(store)) == 1


def test_a_paused_job_of_a_project_that_is_archived_pays_and_holds_nothing_for_good(store: Store) -> None:
    projects = store.projects(LOCAL_OWNER)
    owner = replace(LOCAL_OWNER, project_id=run(projects.create("Tides")).id)
    limit(store, {MONTH: 10_000})
    job = queued(store, 1000, owner)
    run(store.jobs.record(job, {SO_FAR: 30}))
    run(store.fine_tuning(owner).pause(job.id))
    assert state_of(store) == {(0, 2000)}
    run(projects.archive(owner.project))
    assert state_of(store) == {(60, 0)} and len(events(store)) == 1
    ended = run(store.jobs.get(owner, KIND, job.id))
    assert ended.state == "cancelled" and ended.result["finished_at"] > 0


def test_what_a_job_holds_outlives_the_server_that_began_it(store: Store) -> None:
    limit(store, ALL)
    job = queued(store, 1000)

    async def stop_and_start() -> None:
        await store.metering.finish()
        fresh = Metering(store.database, alone=True)  # which takes all other servers for dead
        await fresh.ready()
        await fresh.purses.beat()

    run(stop_and_start())
    assert state_of(store) == {(0, 2000)}
    run(store.jobs.release(job))
    job = run(store.jobs.claim({KIND: ("queued",)}, "another", 60))  # type: ignore[assignment]
    run(store.jobs.move(job, ("queued",), "failed", {}, lambda c, moved: settle(c, moved, 0)))
    assert state_of(store) == {(0, 0)} and events(store) == []


def test_a_price_that_changes_holds_for_jobs_that_begin_after_that(store: Store) -> None:
    limit(store, ALL)
    job = queued(store, 1000)
    run(store.database.write(lambda connection: set_price(connection, "base", Price(5_000_000, 0, 0))))
    run(store.jobs.move(job, ("queued",), "succeeded", {}, lambda c, moved: settle(c, moved, 1000)))
    assert state_of(store) == {(2000, 0)}


def test_nothing_is_begun_where_nothing_is_left(store: Store) -> None:
    limit(store, {TOTAL: 0})
    with pytest.raises(BudgetSpentError, match="budget of project proj_default"):
        create(store)
    limit(store, {TOTAL: 100})
    create(store)
    limit(store, {TOTAL: 0})
    run(store.database.write(lambda connection: set_price(connection, "base", None)))
    create(store)  # what costs nothing needs no budget


def test_a_budget_that_is_removed_while_a_job_trains_is_not_missed(store: Store) -> None:
    limit(store, ALL)
    job = queued(store, 1000)
    run(store.quotas(LOCAL_OWNER).remove_budget(TOTAL))
    limit(store, {TOTAL: 50})
    run(store.jobs.move(job, ("queued",), "succeeded", {}, lambda c, moved: settle(c, moved, 700)))
    assert budgets(store)[MONTH].used_micro == 1400
    assert {budget.held_micro for budget in budgets(store).values()} == {0}


def test_a_project_has_so_many_unfinished_jobs_and_no_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALE_TUNING_JOBS", "2")
    settings.cache_clear()
    first, _ = create(store), create(store)
    with pytest.raises(LimitExceededError, match=r"2 fine-tuning jobs that have not ended.*GALE_TUNING_JOBS"):
        create(store)
    other, project = run(store.organisations.create("Other"))
    create(store, replace(LOCAL_OWNER, organisation_id=other.id, project_id=project.id))
    run(store.fine_tuning(LOCAL_OWNER).cancel(first.id))
    create(store)


def test_what_people_do_to_jobs_stands_in_the_audit_log(store: Store) -> None:
    tuning = store.fine_tuning(LOCAL_OWNER)
    job = create(store)
    run(tuning.pause(job.id))
    run(tuning.resume(job.id))
    run(tuning.cancel(job.id))
    with pytest.raises(ConflictError):
        run(tuning.pause(job.id))
    page = run(store.audit_log(LOCAL_OWNER).page(AuditFilter(resource_ids=[job.id])))
    assert [each.type for each in reversed(page.items)] == [
        f"fine_tuning_job.{done}" for done in ("created", "paused", "resumed", "cancelled")
    ]
    (created,) = [each for each in page.items if each.type == "fine_tuning_job.created"]
    assert created.project_id == "proj_default" and created.actor["session"]["user"]["id"] == "user_first"
    assert created.details == {"id": job.id, "model": "base", "training_file": job.payload["training_file"]}
