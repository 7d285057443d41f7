"""An event loop in a thread of its own, for what belongs to one loop while its callers come and go with theirs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from gale.core.errors import StoreError

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines handed over from anywhere. Once handed over they are finished, whoever stops waiting."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result]:
        """Begin ``work`` in the loop. Raises :class:`StoreError` after :meth:`close`."""
        with self._lock:
            if self._closed:
                raise StoreError("The database is closed.")
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    async def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """``work``'s result, awaited in the caller's own loop."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(work)))

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for all that was handed over, then for ``last``, and end the thread. May be called again. Blocks."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            ended = asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        try:
            ended.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @staticmethod
    async def _finish(last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await last()
