"""Fine-tuning jobs as their project sees them: asked for, looked at, paused, cancelled.

The work is done elsewhere (:mod:`gale.platform.tuning_supervisor`); both meet in the job's state only, of which each
moves what it may, so that of two that move together one is refused.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, select

from gale.data.examples import Method
from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.files import Files
from gale.platform.jobs import Job, JobEvent, Jobs
from gale.platform.listing import Listing

KIND = "fine_tuning"
State = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
PURPOSE = "fine-tune"
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

    def __init__(self, jobs: Jobs, files: Files, actor: Actor) -> None:
        self._jobs, self._files, self._actor = jobs, files, actor

    async def create(self, asked: Asked) -> Job:
        """Begin with checking the files. Raises :class:`NotFoundError` for a file that is not there, or not for this,
        and :class:`NotAllowedError`."""
        authorize(self._actor, "write")

        def check(connection: Connection) -> None:
            for file_id in filter(None, (asked.training_file, asked.validation_file)):
                self._files.require(connection, file_id, PURPOSE)

        job = await self._jobs.create(
            self._actor, KIND, asdict(asked), prefix="ftjob", state="validating_files", check=check
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
        """Raises :class:`NotFoundError`, :class:`ConflictError` for one that has ended, :class:`NotAllowedError`."""
        return await self._change(
            job_id, ("validating_files", "queued", "running", "paused"), "cancelled", "The job has been cancelled"
        )

    async def pause(self, job_id: str) -> Job:
        """It goes on from its last checkpoint. Raises as :meth:`cancel` does."""
        return await self._change(
            job_id, ("validating_files", "queued", "running"), "paused", "The job has been paused"
        )

    async def resume(self, job_id: str) -> Job:
        """Raises as :meth:`cancel` does, also for a job that is not paused."""
        validated = "examples" in (await self.get(job_id)).result
        state: State = "queued" if validated else "validating_files"
        return await self._change(job_id, ("paused",), state, "The job has been resumed")

    async def _change(self, job_id: str, from_states: tuple[State, ...], to_state: State, message: str) -> Job:
        authorize(self._actor, "write")
        job = await self._jobs.change(self._actor, KIND, job_id, from_states, to_state)
        await self._jobs.add_event(job, message)
        return job


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
