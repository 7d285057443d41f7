"""What a job made is served if the job is said to have ended so, and not otherwise."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from gale.core.errors import StoreError
from gale.engine.request import UnknownAdapterError
from gale.platform import tables, tuning_supervisor
from gale.platform.access import LOCAL_OWNER, Actor
from gale.platform.errors import ConflictError, LeaseLostError
from gale.platform.fine_tuned_models import FineTunedModels
from gale.platform.fine_tuning import KIND
from gale.platform.jobs import Job
from gale.platform.store import Store
from gale.platform.tuning_supervisor import TuningSupervisor

CHECKPOINTS = [{"step": step, "train_loss": 1.0, "held_out": {}} for step in (1, 2)]
SUCCESS: dict[str, Any] = {"trained_tokens": 70, "checkpoints": CHECKPOINTS}
DIVERGED = {**SUCCESS, "error": {"code": "training_diverged", "message": "It broke down.", "param": None}}


class Host:
    """An engine as far as adapters go."""

    model_id = "base"
    folder = Path("/nowhere")

    def __init__(self) -> None:
        self.served: set[str] = set()

    def load_adapter(self, name: str, folder: Path) -> None:
        self.served.add(name)

    def unload_adapter(self, name: str) -> None:
        if name not in self.served:
            raise UnknownAdapterError(name)
        self.served.remove(name)


class Bench:
    """A supervisor over a store, with a job that trains: its process's outcome is the test's."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store, self.host = store, Host()
        self.models = FineTunedModels(store.database, self.host, home)
        self.supervisor = TuningSupervisor(
            store.database, store.jobs, self.models, home, lambda file_id: home / file_id, store.metering
        )

    async def running(self, actor: Actor = LOCAL_OWNER) -> Job:
        asked = {
            "model": "base", "base": "base", "base_folder": "/nowhere", "adapter": None, "training_file": "file-1",
            "validation_file": None, "method": "supervised", "hyperparameters": {}, "grader": None, "seed": 1,
            "suffix": None, "metadata": {},
        }  # fmt: skip
        found = {"examples": {"train": {"rows": 10}}, "hyperparameters": {}, "steps": 2}
        found |= {"most_tokens": 80, "price_micro": 1_000_000, "tokens_so_far": 30}
        jobs = self.store.jobs
        await jobs.create(actor, KIND, asked, prefix="ftjob", state="running", result=found)
        job = await jobs.claim({KIND: ("running",)}, "tuner", 60)
        assert job is not None
        return job

    async def train(self, job: Job, outcome: dict[str, Any], meanwhile: Any) -> None:
        async def outcome_of(*asked: Any) -> dict[str, Any]:
            return outcome

        load = self.models.serve

        async def serve(models: Any) -> None:
            await load(models)
            assert self.host.served
            await meanwhile()

        self.supervisor._outcome_of = outcome_of  # type: ignore[method-assign]
        self.models.serve = serve  # type: ignore[method-assign]
        try:
            await self.supervisor._train(job)
        finally:
            self.models.serve = load  # type: ignore[method-assign]


@pytest.fixture
def store(database_url: str, tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(database_url, files=tmp_path / "files")
    yield opened
    opened.close()


async def nothing() -> None:
    return


@pytest.mark.parametrize("outcome", [SUCCESS, DIVERGED], ids=["success", "failure"])
@pytest.mark.parametrize("end", ["cancel", "pause", "lose"])
def test_what_was_served_a_moment_before_its_job_became_another_s_is_served_no_more(
    store: Store, tmp_path: Path, outcome: dict[str, Any], end: str
) -> None:
    async def main() -> None:
        b = Bench(store, tmp_path / "home")
        job = await b.running()

        async def meanwhile() -> None:
            if end == "lose":
                await store.jobs.release(job)
                await store.jobs.claim({KIND: ("running",)}, "another", 60)
            else:
                await getattr(store.fine_tuning(LOCAL_OWNER), end)(job.id)

        with pytest.raises((ConflictError, LeaseLostError)):
            await b.train(job, outcome, meanwhile)
        assert b.host.served == set()
        await b.models.refresh()
        assert b.host.served == set()

    asyncio.run(main())


def test_what_a_database_that_was_lost_kept_after_all_is_served_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        b = Bench(store, tmp_path / "home")
        job = await b.running()
        move = store.jobs.move

        async def forget(*asked: Any) -> Job:
            await move(*asked)
            raise StoreError("The connection was lost.")

        with monkeypatch.context() as broken:
            broken.setattr(store.jobs, "move", forget)
            with pytest.raises(StoreError):
                await b.train(job, SUCCESS, nothing)
        assert b.host.served == set()
        await b.models.refresh()
        assert len(b.host.served) == 2
        assert (await store.jobs.get(LOCAL_OWNER, KIND, job.id)).state == "succeeded"

    asyncio.run(main())


@pytest.mark.parametrize(("outcome", "state"), [(SUCCESS, "succeeded"), (DIVERGED, "failed")])
def test_what_an_ended_job_left_stays_served_and_is_paid_for(
    store: Store, tmp_path: Path, outcome: dict[str, Any], state: str
) -> None:
    async def main() -> None:
        b = Bench(store, tmp_path / "home")
        job = await b.running()
        await b.train(job, outcome, nothing)
        await b.models.refresh()
        ended = await store.jobs.get(LOCAL_OWNER, KIND, job.id)
        assert (ended.state, ended.result["trained_tokens"], len(b.host.served)) == (state, 70, 2)

    asyncio.run(main())


def test_a_job_of_somebody_who_is_not_let_in_any_more_ends_and_pays_for_what_was_reported(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        async def wait(self) -> None:
            await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def running(*asked: Any) -> AsyncIterator[Process]:
        yield Process()

    async def main() -> None:
        b = Bench(store, tmp_path / "home")
        actor = replace(LOCAL_OWNER, key_id="key_revoked")
        job = await b.running(actor)
        monkeypatch.setattr(tuning_supervisor, "running", running)
        with pytest.raises(ConflictError, match="no longer let in"):
            await b.supervisor._outcome_of("train", "trained.json", job, tmp_path)
        assert (await store.jobs.get(actor, KIND, job.id)).state == "cancelled"
        events = tables.usage_events.c
        query = select(events.input_tokens, events.cost_micro, events.api_key_id)
        (paid,) = await store.database.read(lambda connection: connection.execute(query).all())
        assert tuple(paid) == (30, 30, "key_revoked")

    asyncio.run(main())


def test_checkpoints_and_data_of_an_ended_job_are_removed(store: Store, tmp_path: Path) -> None:
    async def main() -> None:
        b = Bench(store, tmp_path / "home")
        job = await b.running()
        folder = tmp_path / "home" / "jobs" / job.id
        for name in ("data", "run/checkpoints/step-1", "run/model"):
            (folder / name).mkdir(parents=True)
        await b.models.refresh()
        assert (folder / "data").exists()
        await store.fine_tuning(LOCAL_OWNER).cancel(job.id)
        await b.models.refresh()
        assert {path.name for path in (folder / "run").iterdir()} == {"model"} and not (folder / "data").exists()

    asyncio.run(main())
