"""Batches to results in order: in this process, in processes beside it, or on a Ray cluster.

Whoever works, results come back in the order of the batches, so that what is written is the same to the byte.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from gale.core.cluster import joined_ray
from gale.core.errors import DataError, GaleError
from gale.core.settings import settings
from gale.data.pipeline import Batch, BatchResult, BatchWorker, Job

_AHEAD = 2  # batches that wait for each worker, so that none is idle while this process deduplicates and writes
_LITTLE = 8 * 2**20  # bytes that one process has cleaned before others have even started
_RAY_WINDOW = 8  # batches for each of the cluster's CPUs that are under way at once


def workers_for(wanted: int, size: int) -> int:
    """How many processes to use: as many as wanted, or one per core where 0 is wanted and ``size`` bytes are many."""
    if wanted:
        return wanted
    return 1 if size < _LITTLE else settings().threads or len(os.sched_getaffinity(0))


Results = Generator[BatchResult, None, None]  # closing it ends the work


def map_here(job: Job, batches: Iterator[Batch]) -> Results:
    """Work on the batches one after another in this process."""
    worker = BatchWorker(job)
    for batch in batches:
        yield worker(batch)


def map_in_processes(job: Job, batches: Iterator[Batch], workers: int) -> Results:
    """Work on the batches in ``workers`` new processes. Raises :class:`DataError` where one of them dies."""
    # Spawned and not forked: this process may run threads of torch or of the tokenizer, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(job,))
    waiting: deque[Future[BatchResult]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that cleaned data has died, perhaps for lack of memory.",
            hint="Use fewer `workers`. A program of your own that prepares data needs `if __name__ == '__main__':`.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def map_on_ray(job: Job, batches: Iterator[Batch], address: str) -> Results:
    """Work on the batches with Ray Data on the cluster at ``address`` (or on the one this process is connected to).

    Batches travel to the machines and results back, so these need no files in common; they need Gale.
    Raises :class:`GaleError` where Ray is missing or there is no cluster.
    """
    with joined_ray(address):
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one already
        context.print_on_execution_start = False
        try:
            reference = ray.put(job)
            window = max(1, int(ray.cluster_resources().get("CPU", 1))) * _RAY_WINDOW
            while some := list(itertools.islice(batches, window)):
                rows = [{"number": number, "content": pickle.dumps(batch)} for number, batch in enumerate(some)]
                data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                    functools.partial(_work_on_ray, reference=reference)
                )
                results: dict[int, dict[str, Any]] = {row["number"]: row for row in data.iter_rows()}
                for number in range(len(some)):
                    result = pickle.loads(results[number]["content"])  # noqa: S301 - made by _work_on_ray
                    if isinstance(result, GaleError):
                        raise result
                    yield result
        except ray.exceptions.RayError as error:
            raise DataError(f"The Ray cluster could not do the work: {error}") from error


_worker: BatchWorker | None = None
_ray_workers: dict[str, BatchWorker] = {}


def _start(job: Job) -> None:
    """Set up a worker process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker on each core already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = BatchWorker(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os._exit(1)


def _work(batch: Batch) -> BatchResult:
    assert _worker is not None
    return _worker(batch)


def _work_on_ray(row: dict[str, Any], reference: Any) -> dict[str, Any]:
    import ray

    try:
        if (key := reference.hex()) not in _ray_workers:
            _ray_workers.clear()  # another job's
            _ray_workers[key] = BatchWorker(ray.get(reference))
        result: BatchResult | GaleError = _ray_workers[key](pickle.loads(row["content"]))  # noqa: S301 - our own
    except GaleError as error:  # sent back as what it is, since Ray would wrap it
        result = error
    return {"number": row["number"], "content": pickle.dumps(result)}
