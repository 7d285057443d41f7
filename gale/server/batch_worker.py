"""The worker beside the requests: takes up batches, new ones and those whose process was killed."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from gale.core.errors import GaleError
from gale.platform.errors import ConflictError
from gale.platform.ids import new_id
from gale.platform.jobs import Job
from gale.platform.store import Store
from gale.server.batch_run import BatchRun, Pace, now
from gale.server.disconnect import cancel
from gale.server.in_process import InProcess

KIND = "batch"
ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")
MOST_AT_ONCE = 4
POLL_S = 2.0
log = structlog.get_logger("gale.server.batches")


class BatchWorker:
    """Works on a few batches at once; ``run`` goes on until it is cancelled."""

    def __init__(self, store: Store, own: InProcess, pace: Pace | None = None) -> None:
        self._store = store
        self._own = own
        self._pace = pace or Pace()
        self._name = new_id("worker")
        self._runs: dict[asyncio.Task[None], BatchRun] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is a new batch, or one was changed: look at once."""
        self._wake.set()
        for run in self._runs.values():
            run.nudge()

    async def run(self) -> None:
        """Take up whatever is to be done."""
        try:
            while True:
                if not await self._take_up():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await self._wake.wait()
                    self._wake.clear()
        finally:
            await cancel(*self._runs)

    async def _take_up(self) -> bool:
        if len(self._runs) >= MOST_AT_ONCE:
            return False
        try:
            job = await self._store.jobs.claim({KIND: ACTIVE}, self._name, self._pace.lease_s)
        except GaleError as error:
            log.warning("no batch could be taken up", reason=error.message)
            return False
        if job is None:
            return False
        run = BatchRun(self._store, self._own, job, self._pace)
        task = asyncio.create_task(self._work(run, job))
        self._runs[task] = run
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._runs[task]
        self._wake.set()

    async def _work(self, run: BatchRun, job: Job) -> None:
        try:
            await run.run()
        except asyncio.CancelledError:  # the server stops: whoever starts next goes on at once
            await self._store.jobs.release(job)
            raise
        except ConflictError:  # its tenant was faster; taken up anew it is seen as it is
            await self._store.jobs.release(job)
        except (GaleError, OSError) as error:
            # Such as a full disk: left as it is, and tried again when the lease is over.
            log.warning("batch interrupted", batch=job.id, reason=str(error))
        except Exception:
            log.exception("batch failed", batch=job.id)
            fault = {"code": "internal_error", "message": "Gale failed; its log says why.", "line": None, "param": None}
            with contextlib.suppress(GaleError):
                await self._store.jobs.move(job, ACTIVE, "failed", {"errors": [fault], "failed_at": now()})
