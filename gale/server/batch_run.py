"""One batch at work, from wherever it stands to its end.

OpenAI's states: ``validating``, then ``failed`` or ``in_progress``, ``finalizing``, ``completed``; ``expired`` when its
time is over; ``cancelling`` and ``cancelled`` when that was asked for. Both of the last keep what was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import structlog

from gale.core.errors import StoreError
from gale.platform.errors import ConflictError, LeaseLostError
from gale.platform.identities import may_go_on
from gale.platform.ids import new_id
from gale.platform.jobs import Job
from gale.platform.store import Store
from gale.server.batch_journal import Journal, Kind
from gale.server.batch_lines import Line, lines, validate
from gale.server.disconnect import cancel
from gale.server.in_process import Answer, InProcess
from gale.server.json_text import to_json

# An engine that breaks may break again on the same line; what is merely too much for now is asked again for ever.
MOST_TRIES = 5
_LONGEST_WAIT_S = 30.0
_FILES: dict[str, Kind] = {"output_file_id": "output", "error_file_id": "errors"}
_AGAIN_LATER = ("engine_overloaded", "server_overloaded", "server_shutting_down", "store_unavailable")
log = structlog.get_logger("gale.server.batches")


@dataclass(frozen=True, slots=True)
class Pace:
    """``lines`` of a batch at once; its lease, and how often that is renewed and its tenant's wishes are seen."""

    lines: int = 8
    lease_s: float = 15.0
    beat_s: float = 1.0


class BatchRun:
    """The work on one claimed batch."""

    def __init__(self, store: Store, own: InProcess, job: Job, pace: Pace) -> None:
        self._store = store
        self._own = own
        self._job = job
        self._pace = pace
        self._journal: Journal | None = None
        self._ended = False
        self._nudged = asyncio.Event()
        self._cancelling = asyncio.Event()

    def nudge(self) -> None:
        """Its tenant may have asked for something."""
        self._nudged.set()

    async def run(self) -> None:
        """Raises :class:`LeaseLostError`, :class:`ConflictError`, :class:`StoreError` and :class:`NoSpaceError`; what
        was done until then stays."""
        working, beating = asyncio.create_task(self._work()), asyncio.create_task(self._beat())
        try:
            await asyncio.wait((working, beating), return_when=asyncio.FIRST_COMPLETED)
            (working if working.done() else beating).result()
        finally:
            await cancel(working, beating)
            if self._journal is not None:
                await asyncio.to_thread(self._journal.close)

    async def _work(self) -> None:
        if self._job.state == "validating" and not await self._validate():
            return
        self._journal = await asyncio.to_thread(Journal, self._store.file_folder.batch_path(self._job.id))
        if self._job.state == "in_progress" and not self._counted:
            await self._answer_all(self._journal)
        if self._cancelling.is_set():
            self._job = await self._store.jobs.renew(self._job, self._pace.lease_s)
        await self._finish(self._journal)

    async def _validate(self) -> bool:
        path = self._store.file_folder.path(self._job.payload["input_file_id"])
        found = await asyncio.to_thread(validate, path, self._job.payload["endpoint"])
        result: dict[str, Any] = {"model": found.model}
        if found.errors:
            result |= {"errors": found.errors, "failed_at": now()}
        else:
            result |= {"total": found.total, "in_progress_at": now()}
        if self._cancelling.is_set():
            self._job = await self._store.jobs.renew(self._job, self._pace.lease_s)
            return True
        self._job = await self._store.jobs.move(
            self._job, ("validating",), "failed" if found.errors else "in_progress", result
        )
        return not found.errors

    async def _answer_all(self, journal: Journal) -> None:
        """All lines that are not done, until the end, the window's end or the tenant's wish."""
        left_s = self._job.payload["expires_at"] - time.time()
        answering = asyncio.create_task(self._answer_lines(journal))
        wished = asyncio.create_task(self._cancelling.wait())
        try:
            await asyncio.wait((answering, wished), timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            await cancel(answering, wished)

    async def _answer_lines(self, journal: Journal) -> None:
        waiting = self._lines(journal)
        turn = asyncio.Lock()

        async def one_after_another() -> None:
            while True:
                async with turn:
                    line = await asyncio.to_thread(next, waiting, None)
                if line is None:
                    return
                await self._answer(journal, line)

        tasks = [asyncio.create_task(one_after_another()) for _ in range(self._pace.lines)]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel(*tasks)

    def _lines(self, journal: Journal) -> Iterator[Line]:
        done = frozenset(journal.done)
        path = self._store.file_folder.path(self._job.payload["input_file_id"])
        return (line for line in lines(path) if line.custom_id not in done)

    async def _answer(self, journal: Journal, line: Line) -> None:
        request_id = new_id("batch_req")
        state = {
            "actor": self._job.actor,
            "metering": self._store.metering,
            "batch": self._job.id,
            "request_id": request_id,
        }
        tries = 0
        while True:
            answer = await self._own.post(self._job.payload["endpoint"], line.body, state)
            body = json.loads(answer.content)
            tries += 1
            if not _again(answer, body, tries):
                break
            await asyncio.sleep(_wait_s(answer))
        kind: Kind = "output" if answer.status < 300 and not _broke(answer, body) else "errors"
        response = {"status_code": answer.status, "request_id": request_id, "body": body}
        journal.add(kind, line.custom_id, _line(request_id, line.custom_id, response, None), body.get("usage"))

    async def _finish(self, journal: Journal) -> None:
        """Make files of the answers, and end. Done again after a kill it comes to the same."""
        jobs, folder = self._store.jobs, self._store.file_folder
        if not self._counted:
            if self._job.state == "in_progress" and len(journal.done) < self._job.result["total"]:
                await asyncio.to_thread(self._expire, journal)
            elif self._job.state == "in_progress":
                self._job = await jobs.move(self._job, ("in_progress",), "finalizing", {"finalizing_at": now()})
            await asyncio.to_thread(journal.sync)
            made = {name: new_id("file") if journal.path(kind) else None for name, kind in _FILES.items()}
            self._job = await jobs.record(self._job, {**self._progress(), **made})
        for name, kind in _FILES.items():
            if (file_id := self._job.result[name]) is not None:
                await self._store.files(self._job.actor).adopt(
                    folder.batch_path(self._job.id) / f"{kind}.jsonl",
                    file_id,
                    filename=f"{self._job.id}_{kind}.jsonl",
                    purpose="batch_output",
                    lasts_s=self._job.payload["output_lasts_s"],
                )
        end = {"finalizing": "completed", "in_progress": "expired", "cancelling": "cancelled"}[self._job.state]
        self._ended = True
        self._job = await jobs.move(self._job, (self._job.state,), end, {f"{end}_at": now()})
        log.info("batch ended", batch=self._job.id, state=end)
        await asyncio.to_thread(folder.remove_batch, self._job.id)

    @property
    def _counted(self) -> bool:
        """Whether all that will be done is: its files have names, written down before the files get their places, so
        that a kill in between neither makes two of them nor counts what is no longer in the journal."""
        return "output_file_id" in self._job.result

    def _expire(self, journal: Journal) -> None:
        error = {"code": "batch_expired", "message": "This request could not be answered within the batch's window."}
        for line in self._lines(journal):
            journal.add("errors", line.custom_id, _line(new_id("batch_req"), line.custom_id, None, error))

    async def _beat(self) -> None:
        """Keep the lease and show how far the work has come, for as long as nobody cancels this."""
        renewed = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(self._pace.beat_s):
                    await self._nudged.wait()
            except TimeoutError:
                pass
            self._nudged.clear()
            if self._journal is not None:
                await asyncio.to_thread(self._journal.sync)
            try:
                await self._check_rights()
                seen = await self._store.jobs.renew(self._job, self._pace.lease_s, self._progress())
            except LeaseLostError:
                if not self._ended:
                    raise
                continue
            except StoreError:
                if time.monotonic() - renewed > self._pace.lease_s:
                    raise LeaseLostError("The lease could not be renewed in time.") from None
                continue
            renewed = time.monotonic()
            if seen.state == "cancelling":
                self._cancelling.set()

    async def _check_rights(self) -> None:
        """A batch of somebody who is not let in any more is cancelled."""
        actor = self._job.actor
        if self._cancelling.is_set() or await self._store.database.read(lambda c: may_go_on(c, actor)):
            return
        log.info("batch cancelled", batch=self._job.id, reason="its key or account is no longer valid")
        with contextlib.suppress(ConflictError):  # it has ended, or is being cancelled
            await self._store.jobs.move(
                self._job, ("validating", "in_progress", "finalizing"), "cancelling", {"cancelling_at": now()}
            )

    def _progress(self) -> dict[str, Any]:
        if self._journal is None or self._counted:
            return {}
        completed, failed = self._journal.counts
        return {"completed": completed, "failed": failed, "usage": self._journal.tokens.shown}


def now() -> int:
    """In the whole seconds of OpenAI's objects."""
    return int(time.time())


def _line(request_id: str, custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> str:
    return to_json({"id": request_id, "custom_id": custom_id, "response": response, "error": error})


def _again(answer: Answer, body: dict[str, Any], tries: int) -> bool:
    """Whether the same request may well succeed later."""
    code = body.get("error", {}).get("code") if answer.status >= 400 else None
    if answer.status == 429:
        return code != "insufficient_quota"
    return code in _AGAIN_LATER or ((code == "engine_failed" or _broke(answer, body)) and tries < MOST_TRIES)


def _broke(answer: Answer, body: dict[str, Any]) -> bool:
    """Whether it is a response that failed after it had begun, which is no error of HTTP."""
    return answer.status < 300 and body.get("object") == "response" and body.get("status") == "failed"


def _wait_s(answer: Answer) -> float:
    try:
        return min(max(float(answer.headers.get("retry-after", "1")), 0.1), _LONGEST_WAIT_S)
    except ValueError:
        return 1.0
