"""Values that are read from the database often and change rarely, remembered for seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gale.core.errors import StoreError

Value = TypeVar("Value")

MOST = 10_000  # values, and as many things that are not there
FRESH_S = 4.0
STALE_S = 60.0
# Beyond it, a value that is remembered is not waited for; and how long after a failure nothing is asked again.
_PATIENCE_S = 1.0


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    read_at: float


class Recent(Generic[Value]):
    """Remembers what it read for 4 s, and for 60 s where the database cannot be read.

    So a change is obeyed within 4 s, and a database that is away for a moment stops nobody who was just served. That
    something is not there is remembered for 4 s too, in a place of its own: however many such things are asked for,
    they drive out nothing that is there. Belongs to one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries: dict[Hashable, _Entry[Value]] = {}
        self._absent: dict[Hashable, float] = {}
        self._reading: dict[Hashable, asyncio.Task[Value | None]] = {}
        self._clock = clock
        self._failed_at = -STALE_S

    async def get(self, key: Hashable, read: Callable[[], Awaitable[Value | None]]) -> Value | None:
        """The value of ``key``, from ``read`` unless it is remembered. Raises :class:`StoreError`."""
        entry, now = self._entries.get(key), self._clock()
        if entry is not None and now - entry.read_at <= FRESH_S:
            return entry.value
        if now - self._absent.get(key, -STALE_S) <= FRESH_S:
            return None
        usable = entry if entry is not None and now - entry.read_at <= STALE_S else None
        if usable is not None and now - self._failed_at <= _PATIENCE_S:
            return usable.value
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = asyncio.ensure_future(self._read(key, read))
            task.add_done_callback(lambda done: self._done(key, done))
        # Waited for and not awaited: one caller who leaves must not end what others wait for.
        done, _ = await asyncio.wait({task}, timeout=_PATIENCE_S if usable is not None else None)
        if usable is not None and (not done or isinstance(task.exception(), StoreError)):
            return usable.value
        return task.result()

    def forget(self) -> None:
        """Read everything anew, after a change that was made here."""
        self._entries.clear()
        self._absent.clear()
        self._reading.clear()

    async def _read(self, key: Hashable, read: Callable[[], Awaitable[Value | None]]) -> Value | None:
        began = self._clock()
        try:
            value = await read()
        except StoreError:
            self._failed_at = self._clock()
            raise
        if self._reading.get(key) is not asyncio.current_task():  # forgotten while it was read
            return value
        self._entries.pop(key, None)
        self._absent.pop(key, None)
        if value is not None:
            self._make_room(self._entries)
            self._entries[key] = _Entry(value, began)
        else:
            self._make_room(self._absent)
            self._absent[key] = began
        return value

    def _make_room(self, remembered: dict[Hashable, Any]) -> None:
        while len(remembered) >= MOST:
            del remembered[next(iter(remembered))]

    def _done(self, key: Hashable, task: asyncio.Task[Value | None]) -> None:
        if self._reading.get(key) is task:
            del self._reading[key]
        if not task.cancelled():
            task.exception()  # seen, even if everybody who waited has left
