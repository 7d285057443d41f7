"""From a request's end to the database: events wait in memory and on disk, and are written in batches by one writer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.platform.budgets import BudgetKey, charge
from gale.platform.database import Database
from gale.platform.journal import Orphans, Segment, read_events
from gale.platform.purses import Purses
from gale.platform.usage import UsageEvent, write_events

# Events that memory holds while the database takes none; beyond that they are on disk alone.
MOST_EVENTS = 10_000
# So many in one transaction, and so many segments at once where the database was away for long.
_SEGMENT_EVENTS = 2_000

log = structlog.get_logger("gale.platform.usage")


class UsageQueue:
    """Events that are not in the database yet, in ``folder`` (None: in memory alone). From one event loop."""

    def __init__(self, database: Database, purses: Purses, folder: Path | None, now_us: Callable[[], int]) -> None:
        self.lost = 0
        self._database = database
        self._purses = purses
        self._folder = folder
        self._now_us = now_us
        self._current = Segment(folder)
        self._waiting: list[Segment] = []
        self._spent: dict[Segment, dict[BudgetKey, int]] = {}
        self._failing = False
        self._lock = asyncio.Lock()

    @property
    def waiting(self) -> int:
        """Events that are not in the database."""
        return sum(segment.count for segment in (*self._waiting, self._current))

    @property
    def in_memory(self) -> int:
        """Those of them that are held in memory."""
        return sum(segment.count for segment in (*self._waiting, self._current) if segment.events is not None)

    @property
    def failing(self) -> bool:
        """Whether the database took none of them the last time."""
        return self._failing

    @property
    def full(self) -> bool:
        """Whether so many wait that what costs somebody money should not be begun."""
        return self.waiting >= MOST_EVENTS

    def add(self, event: UsageEvent, spent: Mapping[BudgetKey, int], after: UsageEvent | None = None) -> UsageEvent:
        """Keep ``event``, of which ``spent`` had been set aside, and return it as it is kept.

        Where ``after``, an event of the same request, still waits, both become one: a request that asks an engine many
        times makes one event.
        """
        events = self._current.events
        assert events is not None, "the current one is never forgotten"
        joined = after is not None and after.id in events and (after.model, after.kind) == (event.model, event.kind)
        if after is not None and joined:
            event = events[after.id] + event
        if not joined and self.in_memory >= 2 * MOST_EVENTS:  # neither database nor disk: it has to end somewhere
            self.lost += 1
            log.error("usage_event_lost", cost_micro=event.cost_micro, tokens=event.input_tokens + event.output_tokens)
        else:
            self._current.add(event)
        sums = self._spent.setdefault(self._current, {})
        for key, cost in spent.items():
            sums[key] = sums.get(key, 0) + cost
        if self._current.count >= _SEGMENT_EVENTS:
            self._turn_over()
        return event

    async def flush(self) -> None:
        """Write what waits, the oldest first. Raises :class:`StoreError`, having lost nothing."""
        async with self._lock:
            try:
                while self._waiting:
                    await self._write(self._waiting[0])
                    self._waiting.pop(0).drop()
                # Only now: while the database is away, segments are few and full.
                if self._current.count or self._current in self._spent:
                    self._turn_over()
                    await self._write(self._waiting[0])
                    self._waiting.pop(0).drop()
                self._failing = False
            except StoreError:
                self._failing = True
                await self._spill()
                raise

    async def replay(self) -> None:
        """Write what processes that are no more have left on disk. Raises :class:`StoreError`."""
        orphans = Orphans(self._folder)
        while (orphan := await asyncio.to_thread(orphans.next)) is not None:
            path, handle = orphan
            try:
                events = await asyncio.to_thread(read_events, path)
                await self._charge(events, {})
                path.unlink(missing_ok=True)
                log.info("usage_replayed", events=len(events))
            finally:
                os.close(handle)

    def close(self) -> None:
        """Leave what is not in the database on disk, to be written at the next start."""
        for segment in (*self._waiting, self._current):
            segment.sync()
            segment.close()

    def _turn_over(self) -> None:
        self._waiting.append(self._current)
        self._current = Segment(self._folder)

    async def _write(self, segment: Segment) -> None:
        events = await asyncio.to_thread(segment.read) if segment.events is None else segment.read()
        spent = self._spent.get(segment, {})
        async with self._purses.lock:
            await self._charge(events, spent)
            self._purses.written(spent)
        self._spent.pop(segment, None)

    async def _charge(self, events: list[UsageEvent], spent: Mapping[BudgetKey, int]) -> None:
        def work(connection: Connection) -> None:
            new = write_events(connection, events)
            charge(connection, self._purses.process_id, new, spent, self._now_us())

        await self._database.write(work)

    async def _spill(self) -> None:
        """Put on disk what waits, and free the memory of the newest where that is too much."""
        for segment in list(self._waiting):
            await asyncio.to_thread(segment.sync)
        for segment in reversed(self._waiting):
            if self.in_memory > MOST_EVENTS:
                segment.forget()
