"""Jobs: one worker at a time, legal moves only, and another worker when the first is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from gale.platform import jobs as module
from gale.platform.access import LOCAL_OWNER
from gale.platform.errors import ConflictError, CursorError, LeaseLostError, NotFoundError
from gale.platform.jobs import Job, Jobs
from gale.platform.store import Store

Result = TypeVar("Result")

ACTIVE = {"batch": ("validating", "in_progress")}
OTHER = replace(LOCAL_OWNER, project_id="proj_other")


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store.open(database_url)
    yield opened
    opened.close()


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return store.jobs


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


def create(jobs: Jobs, **more: Any) -> Job:
    return run(jobs.create(LOCAL_OWNER, "batch", {"lines": 3}, prefix="batch", state="validating", **more))


def claim(jobs: Jobs, owner: str = "one", lease_s: float = 60) -> Job | None:
    return run(jobs.claim(ACTIVE, owner, lease_s))


def test_the_oldest_job_is_claimed_first_and_by_one_worker_only(jobs: Jobs) -> None:
    first, second = create(jobs), create(jobs)
    assert first.id.startswith("batch_")
    claimed = claim(jobs)
    assert claimed is not None
    assert (claimed.id, claimed.attempt, claimed.lease_owner, claimed.payload) == (first.id, 1, "one", {"lines": 3})
    other = claim(jobs, "two")
    assert other is not None and other.id == second.id
    assert claim(jobs, "three") is None


def test_only_kinds_and_states_that_a_worker_names_are_claimed(jobs: Jobs) -> None:
    job = create(jobs)
    assert run(jobs.claim({"fine_tuning": ("validating",)}, "one", 60)) is None
    run(jobs.change(LOCAL_OWNER, "batch", job.id, ("validating",), "paused"))
    assert claim(jobs) is None


def test_a_job_keeps_the_rights_of_whoever_asked(jobs: Jobs) -> None:
    actor = replace(LOCAL_OWNER, key_id="key_1", role="member", scopes=frozenset(("use",)), models=frozenset(("m",)))
    job = run(jobs.create(actor, "batch", {}, prefix="batch", state="validating"))
    assert run(jobs.get(actor, "batch", job.id)).actor == actor
    assert create(jobs).actor == LOCAL_OWNER


def test_another_worker_takes_up_what_a_killed_one_left(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    create(jobs)
    killed = claim(jobs, lease_s=10)
    assert killed is not None
    assert claim(jobs, "two") is None
    now = module.now_us()
    monkeypatch.setattr(module, "now_us", lambda: now + 11_000_000)
    second = claim(jobs, "two")
    assert second is not None and second.attempt == 2
    # The first was only slow: it finds out before it can write anything.
    for work in (
        lambda: jobs.renew(killed, 10),
        lambda: jobs.record(killed, {"done": 1}),
        lambda: jobs.move(killed, ("validating",), "failed"),
    ):
        with pytest.raises(LeaseLostError):
            run(work())
    run(jobs.release(killed))
    assert run(jobs.renew(second, 10)).lease_owner == "two"


def test_a_lease_that_is_renewed_is_not_over(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    create(jobs)
    job = claim(jobs, lease_s=10)
    assert job is not None
    now = module.now_us()
    monkeypatch.setattr(module, "now_us", lambda: now + 9_000_000)
    run(jobs.renew(job, 10))
    monkeypatch.setattr(module, "now_us", lambda: now + 18_000_000)
    assert claim(jobs, "two") is None


@pytest.mark.parametrize("hours", [1, -1, 24 * 366])
def test_a_clock_that_is_set_keeps_no_job_from_being_taken_up(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    create(jobs)
    killed = claim(jobs, lease_s=10)
    assert killed is not None
    now = module.now_us()
    monkeypatch.setattr(module, "now_us", lambda: now + hours * 3_600_000_000)
    second = claim(jobs, "two", lease_s=10)
    assert second is not None and second.attempt == 2
    with pytest.raises(LeaseLostError):
        run(jobs.renew(killed, 10))
    assert claim(jobs, "three", lease_s=10) is None
    monkeypatch.setattr(module, "now_us", lambda: now + hours * 3_600_000_000 - 200_000_000)
    assert claim(jobs, "three", lease_s=10) is None, "another server's clock may be a little behind"


def test_a_released_job_is_claimed_at_once(jobs: Jobs) -> None:
    create(jobs)
    job = claim(jobs)
    assert job is not None
    run(jobs.release(job))
    assert claim(jobs, "two") is not None


def test_moves_are_legal_or_refused_and_the_end_is_the_end(jobs: Jobs) -> None:
    create(jobs)
    job = claim(jobs)
    assert job is not None
    job = run(jobs.move(job, ("validating",), "in_progress", {"total": 3}))
    job = run(jobs.record(job, {"done": 1}))
    with pytest.raises(ConflictError, match="is in_progress and cannot become in_progress"):
        run(jobs.move(job, ("validating",), "in_progress"))
    ended = run(jobs.move(job, ("in_progress",), "completed", {"done": 3}))
    assert (ended.state, ended.result, ended.lease_owner) == ("completed", {"total": 3, "done": 3}, None)
    assert claim(jobs) is None
    with pytest.raises(LeaseLostError):
        run(jobs.record(job, {"done": 4}))
    with pytest.raises(ConflictError):
        run(jobs.change(LOCAL_OWNER, "batch", job.id, ("validating", "in_progress"), "cancelled"))


def test_a_worker_learns_of_its_tenant_s_wish_when_it_renews(jobs: Jobs) -> None:
    create(jobs)
    job = claim(jobs)
    assert job is not None
    run(jobs.change(LOCAL_OWNER, "batch", job.id, ("validating",), "cancelling", {"cancelling_at": 1}))
    assert run(jobs.renew(job, 60)).state == "cancelling"
    with pytest.raises(ConflictError):
        run(jobs.move(job, ("validating",), "in_progress"))


def test_events_have_positions_and_are_read_page_by_page(jobs: Jobs) -> None:
    job = create(jobs)
    added = [run(jobs.add_event(job, f"step {index}", data={"step": index})) for index in range(5)]
    assert [event.position for event in added] == [0, 1, 2, 3, 4]
    page = run(jobs.events(LOCAL_OWNER, "batch", job.id, limit=2))
    assert ([event.message for event in page.items], page.has_more) == (["step 4", "step 3"], True)
    page = run(jobs.events(LOCAL_OWNER, "batch", job.id, limit=3, after=page.items[-1].id))
    assert ([event.data["step"] for event in page.items if event.data], page.has_more) == ([2, 1, 0], False)


def test_jobs_are_listed_page_by_page_in_both_orders(jobs: Jobs) -> None:
    created = [create(jobs).id for _ in range(4)]
    page = run(jobs.page(LOCAL_OWNER, "batch", limit=3))
    assert ([job.id for job in page.items], page.has_more) == (created[:0:-1], True)
    page = run(jobs.page(LOCAL_OWNER, "batch", limit=3, after=page.items[-1].id))
    assert ([job.id for job in page.items], page.has_more) == (created[:1], False)
    page = run(jobs.page(LOCAL_OWNER, "batch", limit=2, after=created[0], order="asc"))
    assert ([job.id for job in page.items], page.has_more) == (created[1:3], True)
    with pytest.raises(CursorError):
        run(jobs.page(LOCAL_OWNER, "batch", limit=3, after="batch_unknown"))


def test_another_project_s_job_does_not_exist(jobs: Jobs) -> None:
    job = create(jobs)
    for work in (
        lambda: jobs.get(OTHER, "batch", job.id),
        lambda: jobs.get(LOCAL_OWNER, "fine_tuning", job.id),
        lambda: jobs.change(OTHER, "batch", job.id, ("validating",), "cancelled"),
        lambda: jobs.events(OTHER, "batch", job.id, limit=1),
    ):
        with pytest.raises(NotFoundError):
            run(work())
    assert run(jobs.page(OTHER, "batch", limit=1)).items == []
    with pytest.raises(CursorError):
        run(jobs.page(OTHER, "batch", limit=1, after=job.id))


def test_a_check_refuses_a_job_before_it_is_there(jobs: Jobs) -> None:
    def refuse(connection: Connection, job: Job) -> None:
        raise NotFoundError("There is no such file.")

    with pytest.raises(NotFoundError):
        create(jobs, also=refuse)
    assert run(jobs.page(LOCAL_OWNER, "batch", limit=1)).items == []
