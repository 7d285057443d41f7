"""Does the fine-tuning jobs: one that checks files and one that trains, each a child process at a time.

A job is claimed by lease. A killed server's lease runs out, and whoever finds it so, perhaps the same server started
again, takes the job up: its process goes on from its last checkpoint, on the same curve (see :mod:`gale.train.loop`).
What a process computes again is not reported again, and what it cost is charged as the job ends, which it does once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection

from gale.core import files
from gale.core.errors import ModelError, StoreError
from gale.engine.request import Usage
from gale.platform.budgets import BudgetSpentError
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, LeaseLostError
from gale.platform.fine_tuned_models import FineTuned, FineTunedModels
from gale.platform.fine_tuning import KIND, State, job_folder, model_name
from gale.platform.identities import may_go_on
from gale.platform.ids import new_id
from gale.platform.jobs import Job, Jobs
from gale.platform.metering import Metering
from gale.platform.tuning_bill import PRICE, SO_FAR, USAGE_KIND, read_price, set_aside, settle
from gale.platform.tuning_child import Metrics, Phase, how_it_ended, running
from gale.train.job_recipe import ADAPTERS, JOB, RUN, TRAINED, VALIDATED, Hyperparameters, TuningJob

LEASE_S = 15.0
POLL_S = 2.0
TICK_S = 0.2
RENEW_S = 1.0
MOST_DEATHS = 3  # of a process in a row, without a step between

_AT_WORK: tuple[State, ...] = ("validating_files", "queued", "running")
_INTERNAL_ERROR = {"code": "internal_error", "message": "Gale failed; its log says why.", "param": None}

log = structlog.get_logger("gale.platform.tuning")


class TuningSupervisor:
    """Works beside the requests of one server; :meth:`run` goes on until it is cancelled.

    ``path_of`` says where the bytes of a file lie. ``ray`` is the address of a cluster to train on.
    """

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        models: FineTunedModels,
        home: Path,
        path_of: Callable[[str], Path],
        metering: Metering,
        *,
        ray: str | None = None,
    ) -> None:
        self._database, self._jobs, self._models, self._home = database, jobs, models, home
        self._path_of, self._metering, self._ray = path_of, metering, ray
        self._news = asyncio.Event()

    def look(self) -> None:
        """A job was made or changed: see to it at once."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def run(self) -> None:
        """Do the jobs."""
        await asyncio.gather(
            self._work(("validating_files",), self._validate),
            self._work(("queued", "running"), self._train),
            self._keep_models(),
        )

    async def _keep_models(self) -> None:
        while True:
            with contextlib.suppress(StoreError):
                await self._models.refresh()
            await asyncio.sleep(POLL_S)

    async def _work(self, states: tuple[State, ...], do: Callable[[Job], Any]) -> None:
        """Claim jobs in these states, one after another, and do them."""
        while True:
            news = self._news
            try:
                job = await self._jobs.claim({KIND: states}, new_id("tuner"), LEASE_S)
            except StoreError as error:
                log.warning("tuning_waits_for_the_database", reason=error.message)
                job = None
            if job is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), POLL_S)
                continue
            try:
                await do(job)
            except (ConflictError, LeaseLostError) as error:  # cancelled or paused, which its process is by now
                log.info("fine_tuning_job_left", job=job.id, reason=error.message)
            except StoreError as error:  # when the lease is over it is taken up again
                log.warning("fine_tuning_job_left", job=job.id, reason=error.message)
                await asyncio.sleep(POLL_S)
            except Exception:
                log.exception("fine_tuning_job_broke", job=job.id)
                with contextlib.suppress(ConflictError, LeaseLostError, StoreError):
                    await self._fail(job, _INTERNAL_ERROR)
            finally:
                with contextlib.suppress(StoreError):
                    await self._jobs.release(job)
                self.look()

    async def _validate(self, job: Job) -> None:
        folder = await asyncio.to_thread(self._prepare_folder, job)
        outcome = await self._outcome_of("validate", VALIDATED, job, folder)
        if (error := outcome.get("error")) is not None:
            await self._fail(job, error)
            return
        price = await self._database.read(lambda connection: read_price(connection, job.payload["base"]))
        try:
            await self._metering.with_all_that_is_free(
                job.actor, lambda: self._jobs.move(job, (job.state,), "queued", outcome | {PRICE: price}, set_aside)
            )
        except BudgetSpentError as problem:
            message = f"{problem.message} {problem.hint}"
            await self._fail(job, {"code": "insufficient_quota", "message": message, "param": None})
            return
        await self._jobs.add_event(
            job, f"Files validated: {outcome['examples']['train']['rows']} examples, job enqueued"
        )

    async def _train(self, job: Job) -> None:
        folder = await asyncio.to_thread(self._prepare_folder, job)
        if job.state == "queued":
            job = await self._jobs.move(job, ("queued",), "running")
            await self._jobs.add_event(job, "Fine-tuning job started")
        outcome = await self._outcome_of("train", TRAINED, job, folder)
        made = [{"step": each["step"], "folder": f"{ADAPTERS}/step-{each['step']}"} for each in outcome["checkpoints"]]
        error = outcome.get("error")
        if error is None:
            made[-1:] = [{"step": job.result["steps"], "folder": f"{RUN}/model"}]  # which the last checkpoint is
        named = await self._named(job, made, final=error is None)
        await asyncio.to_thread(self._write_cards, job, outcome, folder, named)
        models = (
            []
            if job.payload["base"] != self._models.base
            else [FineTuned(each["name"], job.id, job.project_id, folder / each["folder"], now_us()) for each in named]
        )
        try:
            await self._models.serve(models)
        except ModelError as problem:
            error = error or {"code": "model_not_served", "message": problem.message, "param": None}
        try:
            await self._end(job, outcome, named, error)
        except BaseException:  # cancelled or taken up by another in its last moment, or the database is away
            self._models.withdraw(models)
            raise

    async def _end(
        self, job: Job, outcome: dict[str, Any], named: list[dict[str, Any]], error: dict[str, Any] | None
    ) -> None:
        """Say how the training ended, and what it left under which names."""
        result: dict[str, Any] = {
            "models": [{"name": each["name"], "folder": each["folder"]} for each in named],
            "checkpoints": [
                {**checkpoint, "name": each["name"]}
                for checkpoint, each in zip(outcome["checkpoints"], named, strict=True)
            ],
        }
        if error is not None:
            # What it left is served, so it is charged for like any other; what left nothing costs nothing.
            await self._fail(job, error, result, outcome["trained_tokens"] if named else 0)
            return
        ended = {"fine_tuned_model": named[-1]["name"]}
        await self._settle(job, ("running",), "succeeded", result | ended, outcome["trained_tokens"])
        for each in named[:-1]:
            await self._jobs.add_event(job, f"Checkpoint created at step {each['step']}: {each['name']}")
        await self._jobs.add_event(job, f"New fine-tuned model created: {named[-1]['name']}")
        await self._jobs.add_event(job, "The job has successfully completed")

    async def _outcome_of(self, phase: Phase, name: str, job: Job, folder: Path) -> dict[str, Any]:
        """What the job's process leaves in the file ``name``; it is started again where it died.

        Raises :class:`ConflictError` and :class:`LeaseLostError` when the job is not ours to do any more; by then the
        process is dead.
        """
        metrics = Metrics(folder / RUN, await self._last_step(job))
        deaths = 0
        while True:
            async with running(phase, folder) as process:
                ended = asyncio.ensure_future(process.wait())
                renew_at, woken = 0.0, False
                while not ended.done():
                    news = self._news
                    if woken or time.monotonic() >= renew_at:
                        now = await self._jobs.renew(job, LEASE_S)
                        if now.state != job.state:
                            raise ConflictError(f"it is {now.state} now")
                        if not await self._database.read(lambda connection: may_go_on(connection, job.actor)):
                            await self._settle(now, (now.state,), "cancelled", {}, now.result.get(SO_FAR, 0))
                            raise ConflictError("whoever asked for it is no longer let in")
                        renew_at = time.monotonic() + RENEW_S
                    if await self._report(job, metrics):
                        deaths = 0
                    waking = asyncio.ensure_future(news.wait())
                    await asyncio.wait([ended, waking], timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                    woken = waking.done()
                    waking.cancel()
            await self._report(job, metrics)
            if (folder / name).is_file():
                outcome: dict[str, Any] = json.loads((folder / name).read_bytes())
                return outcome
            deaths += 1
            ending = how_it_ended(process)
            log.warning("fine_tuning_process_died", job=job.id, ending=ending)
            if deaths >= MOST_DEATHS:
                message = f"The process of the job {ending}, {deaths} times in a row; its log is on the server."
                return {"error": {"code": "process_died", "message": message, "param": None}, "checkpoints": []}
            await self._jobs.add_event(
                job, f"The process of the job {ending}; it goes on from its last checkpoint", level="warn"
            )

    async def _report(self, job: Job, metrics: Metrics) -> bool:
        """Write what was learnt meanwhile down as events; whether there was anything."""
        rows = await asyncio.to_thread(metrics.new)
        steps = job.result.get("steps")
        for row in rows:
            data: dict[str, Any] = {"step": row["step"], "total_steps": steps, "train_loss": row["loss"]}
            for key in ("accuracy", "reward"):
                if key in row:
                    data[f"train_{key}"] = row[key]
            for key, value in row.get("held_out", {}).items():
                data["full_valid_loss" if key == "validation" else key.replace("validation", "full_valid")] = value
            message = f"Step {row['step']}/{steps}: training loss={row['loss']:.4f}"
            if "full_valid_loss" in data:
                message += f", full validation loss={data['full_valid_loss']:.4f}"
            await self._jobs.add_event(job, message, type="metrics", data=data)
        if rows:
            left = (steps - rows[-1]["step"]) * rows[-1]["seconds"]
            await self._jobs.record(job, {"estimated_finish": int(time.time() + left), SO_FAR: rows[-1]["tokens"]})
        return bool(rows)

    async def _last_step(self, job: Job) -> int:
        """The last step that was reported."""
        after = None
        while True:
            page = await self._jobs.events(job.actor, KIND, job.id, limit=100, after=after)
            for event in page.items:
                if event.type == "metrics" and event.data is not None:
                    return int(event.data["step"])
            if not page.has_more:
                return 0
            after = page.items[-1].id

    async def _named(self, job: Job, made: list[dict[str, Any]], *, final: bool) -> list[dict[str, Any]]:
        def work(connection: Connection) -> list[dict[str, Any]]:
            whole = len(made) - 1 if final else -1
            return [
                {**each, "name": model_name(connection, job, None if place == whole else each["step"])}
                for place, each in enumerate(made)
            ]

        return await self._database.read(work)

    async def _settle(
        self, job: Job, from_states: tuple[str, ...], state: State, result: dict[str, Any], tokens: int
    ) -> None:
        """The job's last move, which charges the trained ``tokens``. Raises as :meth:`Jobs.move` does."""
        ended = {"finished_at": int(time.time()), "trained_tokens": tokens}
        await self._jobs.move(job, from_states, state, result | ended, lambda c, moved: settle(c, moved, tokens))
        self._metering.watch.used(USAGE_KIND, Usage(tokens, 0))

    async def _fail(
        self, job: Job, error: dict[str, Any], result: dict[str, Any] | None = None, tokens: int = 0
    ) -> None:
        await self._settle(job, _AT_WORK, "failed", (result or {}) | {"error": error}, tokens)
        await self._jobs.add_event(job, f"The job failed: {error['message']}", level="error")

    def _prepare_folder(self, job: Job) -> Path:
        """The job's folder with what its process is to do."""
        folder, asked = job_folder(self._home, job.id), job.payload
        if not (folder / JOB).is_file():
            validation = asked["validation_file"]
            work = TuningJob(
                method=asked["method"],
                base=Path(asked["base_folder"]),
                adapter=Path(asked["adapter"]) if asked["adapter"] else None,
                training_file=self._path_of(asked["training_file"]),
                validation_file=self._path_of(validation) if validation else None,
                hyperparameters=Hyperparameters.model_validate(asked["hyperparameters"]),
                grader=asked["grader"],
                seed=asked["seed"],
                ray=self._ray,
            )
            files.write_text(folder / JOB, work.model_dump_json())
        return folder

    def _write_cards(self, job: Job, outcome: dict[str, Any], folder: Path, named: list[dict[str, Any]]) -> None:
        """Say beside each adapter what it is and where it comes from."""
        for each, checkpoint in zip(named, outcome["checkpoints"], strict=True):
            facts = {
                "base": job.payload["base"],
                "trained on from": job.payload["adapter"] or "the base",
                "method": job.payload["method"],
                "job": job.id,
                "training file": job.payload["training_file"],
                "validation file": job.payload["validation_file"] or "none",
                "examples": job.result["examples"]["train"]["rows"],
                "seed": job.payload["seed"],
                "step": f"{each['step']} of {job.result['steps']}",
                "hyperparameters": json.dumps(job.result["hyperparameters"]),
                "training loss": checkpoint["train_loss"],
                "held out": json.dumps(checkpoint["held_out"]) if checkpoint["held_out"] else "nothing",
            }
            lines = [f"# {each['name']}", "", *(f"- {name}: {value}" for name, value in facts.items())]
            files.write_text(folder / each["folder"] / "README.md", "\n".join(lines) + "\n")
