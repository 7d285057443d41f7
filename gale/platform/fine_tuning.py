"""Fine-tuning jobs as their project sees them: asked for, looked at, paused, cancelled.

The work is done elsewhere (:mod:`gale.platform.tuning_supervisor`); both meet in the job's state only, of which each
moves what it may, so that of two that move together one is refused.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Connection, select

from gale.core.settings import settings
from gale.engine.request import Usage
from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.audit import EventType, record
from gale.platform.files import Files
from gale.platform.jobs import Also, Job, JobEvent, Jobs, count_unfinished
from gale.platform.limits import LimitExceededError
from gale.platform.listing import Listing
from gale.platform.metering import Metering
from gale.platform.tuning_bill import SO_FAR, USAGE_KIND, check_budgets, settle

if TYPE_CHECKING:
    from gale.data.examples import Method

KIND = "fine_tuning"
State = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
PURPOSE = "fine-tune"
_Done = Literal["created", "cancelled", "paused", "resumed"]
_AUDITED: dict[_Done, EventType] = {
    "created": "fine_tuning_job.created",
    "cancelled": "fine_tuning_job.cancelled",
    "paused": "fine_tuning_job.paused",
    "resumed": "fine_tuning_job.resumed",
}
_LONGEST_OWNER = 40


@dataclass(frozen=True, slots=True)
class Asked:
    """A job as it was asked for. ``model`` is the served name, ``base`` the model below it, whose folder is named;
    ``adapter`` the folder of the fine-tuned model to go on from."""

    model: str
    base: str
    base_folder: str
    adapter: str | None
    training_file: str
    validation_file: str | None
    method: Method
    hyperparameters: dict[str, Any]
    grader: dict[str, Any] | None
    seed: int
    suffix: str | None
    metadata: dict[str, str]


class FineTuning:
    """The jobs of one actor's project. Every method may raise :class:`StoreError`."""

    def __init__(self, jobs: Jobs, files: Files, metering: Metering, actor: Actor) -> None:
        self._jobs, self._files, self._metering, self._actor = jobs, files, metering, actor

    async def create(self, asked: Asked) -> Job:
        """Begin with checking the files. Raises :class:`NotFoundError` for a file that is not there, or not for this,
        :class:`BudgetSpentError` where nothing is left to pay it from, :class:`LimitExceededError` where too many jobs
        have not ended, and :class:`NotAllowedError`."""
        authorize(self._actor, "write")

        def check(connection: Connection, job: Job) -> None:
            for file_id in filter(None, (asked.training_file, asked.validation_file)):
                self._files.require(connection, file_id, PURPOSE)
            _check_room(connection, job.project_id)
            check_budgets(connection, job)
            self._record(connection, job, "created")

        job = await self._metering.with_all_that_is_free(
            self._actor,
            lambda: self._jobs.create(
                self._actor, KIND, asdict(asked), prefix="ftjob", state="validating_files", also=check
            ),
        )
        await self._jobs.add_event(job, f"Created fine-tuning job: {job.id}")
        await self._jobs.add_event(job, f"Validating training file: {asked.training_file}")
        return job

    async def get(self, job_id: str) -> Job:
        """Raises :class:`NotFoundError` and :class:`NotAllowedError`."""
        authorize(self._actor, "read")
        return await self._jobs.get(self._actor, KIND, job_id)

    async def page(self, *, limit: int, after: str | None) -> Listing[Job]:
        """The newest first. Raises :class:`CursorError` and :class:`NotAllowedError`."""
        authorize(self._actor, "read")
        return await self._jobs.page(self._actor, KIND, limit=limit, after=after)

    async def events(self, job_id: str, *, limit: int, after: str | None) -> Listing[JobEvent]:
        """The newest first. Raises :class:`NotFoundError`, :class:`CursorError` and :class:`NotAllowedError`."""
        authorize(self._actor, "read")
        return await self._jobs.events(self._actor, KIND, job_id, limit=limit, after=after)

    async def cancel(self, job_id: str) -> Job:
        """Charge what was trained until now. Raises :class:`NotFoundError`, :class:`ConflictError` for a job that has
        ended, :class:`NotAllowedError`."""
        states: tuple[State, ...] = ("validating_files", "queued", "running", "paused")
        ended = {"finished_at": int(time.time())}
        job = await self._change(job_id, states, "cancelled", "cancelled", ended, settle)
        self._metering.watch.used(USAGE_KIND, Usage(job.result.get(SO_FAR, 0), 0))
        return job

    async def pause(self, job_id: str) -> Job:
        """It goes on from its last checkpoint, and holds what it may yet cost until then. Raises as :meth:`cancel`
        does."""
        return await self._change(job_id, ("validating_files", "queued", "running"), "paused", "paused")

    async def resume(self, job_id: str) -> Job:
        """Raises as :meth:`cancel` does, also for a job that is not paused."""
        validated = "examples" in (await self.get(job_id)).result
        state: State = "queued" if validated else "validating_files"
        return await self._change(job_id, ("paused",), state, "resumed")

    async def _change(
        self,
        job_id: str,
        from_states: tuple[State, ...],
        to_state: State,
        done: _Done,
        result: dict[str, Any] | None = None,
        also: Also | None = None,
    ) -> Job:
        authorize(self._actor, "write")

        def work(connection: Connection, job: Job) -> None:
            if also is not None:
                also(connection, job)
            self._record(connection, job, done)

        job = await self._jobs.change(self._actor, KIND, job_id, from_states, to_state, result, work)
        await self._jobs.add_event(job, f"The job has been {done}")
        return job

    def _record(self, connection: Connection, job: Job, done: _Done) -> None:
        details = {"model": job.payload["model"], "training_file": job.payload["training_file"]}
        record(connection, self._actor, _AUDITED[done], job.id, details, project_id=job.project_id)


def _check_room(connection: Connection, project_id: str) -> None:
    """Raises :class:`LimitExceededError` where the project may not have another job."""
    most = settings().tuning_jobs
    if count_unfinished(connection, project_id, KIND) >= most:
        raise LimitExceededError(
            f"This project has {most} fine-tuning jobs that have not ended, which is as many as it may have "
            "(GALE_TUNING_JOBS). Wait until one ends, or cancel one.",
            "requests",
            None,
        )


def model_name(connection: Connection, job: Job, step: int | None = None) -> str:
    """``ft:<base>:<organisation>:<suffix>:<id>`` of what a job makes, with its step for a checkpoint."""
    table = tables.organisations
    owner = connection.execute(select(table.c.name).where(table.c.id == job.organisation_id)).scalar_one()
    slug = re.sub(r"[^a-z0-9]+", "-", owner.lower()).strip("-")[:_LONGEST_OWNER] or "organisation"
    base = job.payload["base"].replace(":", "-")
    random = re.sub(r"[^A-Za-z0-9]", "", job.id.partition("_")[2])[-8:]
    name = f"ft:{base}:{slug}:{job.payload['suffix'] or ''}:{random}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def job_folder(home: Path, job_id: str) -> Path:
    """Where a job's process works."""
    return home / "jobs" / job_id
