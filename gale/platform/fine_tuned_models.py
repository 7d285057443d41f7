"""What fine-tuning made, served over the base at once: adapters that come and go while the engine runs.

Which models there are is said by the jobs that ended, and nothing else, so that every process that serves the same
base finds the same: at its start, when its own job ends, and soon after another process's.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import structlog
from sqlalchemy import Connection, select, update

from gale.core.errors import ModelError
from gale.engine.request import UnknownAdapterError
from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.audit import record
from gale.platform.database import Database
from gale.platform.errors import NotFoundError
from gale.platform.fine_tuning import KIND, job_folder
from gale.platform.jobs import FINAL_STATES
from gale.train.job_recipe import RUN

PREFIX = "ft:"
_TABLE = tables.jobs

log = structlog.get_logger("gale.platform.fine_tuned_models")


@runtime_checkable
class AdapterHost(Protocol):
    """An engine that takes adapters in and out while it runs, over the model in ``folder``."""

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""

    @property
    def folder(self) -> Path | None:
        """Where the model came from."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter. Raises :class:`ModelError`."""

    def unload_adapter(self, name: str) -> None:
        """Serve it no more. Raises :class:`UnknownAdapterError`."""


@dataclass(frozen=True, slots=True)
class FineTuned:
    """A model that a job made; ``folder`` holds its adapter. ``created_at`` in microseconds since 1970."""

    name: str
    job_id: str
    project_id: str
    folder: Path
    created_at: int


class FineTunedModels:
    """The models over one engine, kept as the jobs say by :meth:`refresh`."""

    def __init__(self, database: Database, engine: AdapterHost, home: Path) -> None:
        self._database, self._engine, self._home = database, engine, home
        self._loaded: dict[str, FineTuned] = {}
        self._known: set[str] = set()  # those that the store has told of
        self._refused: set[str] = set()  # said once, not at every look
        self._tidied: set[str] = set()
        self._lock = asyncio.Lock()

    @property
    def base(self) -> str:
        """The model below."""
        return self._engine.model_id

    def visible(self, actor: Actor, name: str) -> bool:
        """Whether ``actor`` may know of the model ``name``: a fine-tuned one is its project's only."""
        if not name.startswith(PREFIX):
            return True
        model = self._loaded.get(name)
        return model is not None and model.project_id == actor.project_id

    def find(self, actor: Actor, name: str) -> FineTuned | None:
        """The project's model of that name, None where there is none that ``actor`` may use."""
        return self._loaded.get(name) if actor.may_use(name) and self.visible(actor, name) else None

    async def serve(self, models: list[FineTuned]) -> None:
        """Load what a job has just made, before anybody is told of it. Raises :class:`ModelError`."""
        for model in models:
            await asyncio.to_thread(self._engine.load_adapter, model.name, model.folder)
            self._loaded[model.name] = model

    def withdraw(self, models: list[FineTuned]) -> None:
        """Take back what was served of a job that could not be said to have ended, such as one that was cancelled in
        its last moment. If it was said after all, :meth:`refresh` serves them again."""
        for model in models:
            self._unload(model.name)

    async def refresh(self) -> None:
        """Load and unload what has changed, and forget what jobs that ended were trained on.

        Raises :class:`StoreError`.
        """
        async with self._lock:
            ended = await self._database.read(self._read)
            there = {model.name: model for models in ended.values() for model in models}
            for name in self._known & self._loaded.keys() - there.keys():
                self._unload(name)
            self._known = set(there)
            for model in (there[name] for name in there.keys() - self._loaded.keys() - self._refused):
                try:
                    await self.serve([model])
                except ModelError as error:  # of a base that has changed since, or gone from the disk
                    self._refused.add(model.name)
                    log.warning("fine_tuned_model_not_served", model=model.name, reason=error.message)

            for job_id in ended.keys() - self._tidied:
                # People who delete a file want no copy of it left, and a job that ended needs none; nor does it go on
                # from a checkpoint.
                for name in ("data", f"{RUN}/checkpoints"):
                    await asyncio.to_thread(shutil.rmtree, job_folder(self._home, job_id) / name, ignore_errors=True)
                self._tidied.add(job_id)

    async def delete(self, actor: Actor, name: str) -> None:
        """Unload a model and remove it for good. Raises :class:`NotFoundError` and :class:`NotAllowedError`."""
        authorize(actor, "write")
        model = self.find(actor, name)
        if model is None:
            raise NotFoundError(f"There is no fine-tuned model `{name[:200]}`.")

        def forget(connection: Connection) -> None:
            row = connection.execute(select(_TABLE.c.result).where(_TABLE.c.id == model.job_id).with_for_update()).one()
            kept = [each for each in row.result.get("models", []) if each["name"] != name]
            values = {"result": {**row.result, "models": kept}}
            connection.execute(update(_TABLE).where(_TABLE.c.id == model.job_id).values(values))
            record(connection, actor, "fine_tuned_model.deleted", name, project_id=model.project_id)

        await self._database.write(forget)
        self._unload(name)
        await asyncio.to_thread(shutil.rmtree, model.folder, ignore_errors=True)

    def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        with contextlib.suppress(UnknownAdapterError):
            self._engine.unload_adapter(name)

    def _read(self, connection: Connection) -> dict[str, list[FineTuned]]:
        """The jobs over this base that have ended, each with its models."""
        query = select(_TABLE).where(_TABLE.c.kind == KIND, _TABLE.c.state.in_(sorted(FINAL_STATES)))
        ended: dict[str, list[FineTuned]] = {}
        for row in connection.execute(query):
            if row.payload["base"] == self._engine.model_id:
                folder = job_folder(self._home, row.id)
                ended[row.id] = [
                    FineTuned(each["name"], row.id, row.project_id, folder / each["folder"], row.updated_at)
                    for each in row.result.get("models", [])
                ]
        return ended
