"""What this process has of each budget, handed out to requests in memory.

A request that a block has enough money for waits for nothing. The database is asked beside requests as a block runs
low, and by a request only where its block is too small. So all processes together never promise more than a budget has,
and a request pays for its budget with a few additions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.platform import budgets
from gale.platform.budgets import Budget, BudgetKey, spent_error
from gale.platform.database import Database
from gale.platform.scopes import Scope

# How long a process that is not heard of counts as living, and how often each is to be heard of.
LIFE_S = 60.0
BEAT_S = LIFE_S / 4
# A refusal holds for others so long, so that a spent budget does not ask the database at every request.
_REFUSAL_S = 1.0
# Requests of the size of the last one that a block is wished to be enough for, and the least part of the budget.
_AHEAD_REQUESTS, _AHEAD_PART = 4, 64
_HINT = "Ask for fewer tokens (max_tokens), or have the budget raised."


@dataclass(slots=True)
class Purse:
    """This process's part of one budget: what is free, out with requests that run, and spent but not yet written."""

    limit_micro: int
    free: int = 0
    out: int = 0
    spent: int = 0
    refused_until: float = 0.0
    refused_room: int = 0  # what the database still had when it refused
    asked: bool = False  # whether the database may hold something for it
    idle: bool = False
    filling: bool = False

    @property
    def held(self) -> int:
        """All of it: what the database holds for this process."""
        return self.free + self.out + self.spent


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money for one request, out of each of its budgets."""

    purses: Mapping[BudgetKey, Purse]
    amount: int

    def settle(self, cost: int) -> dict[BudgetKey, int]:
        """Give back what was not needed. Returns what was spent of each budget, to be told when that is written."""
        for purse in self.purses.values():
            purse.out -= self.amount
            purse.spent += cost
            purse.free += self.amount - cost
        return dict.fromkeys(self.purses, cost) if cost else {}


class Purses:
    """All purses of this process. From one event loop; ``clock`` is monotonic, ``now_us`` the time of day in UTC.

    One that is ``alone`` takes every other process for dead.
    """

    def __init__(
        self,
        database: Database,
        process_id: str,
        clock: Callable[[], float],
        now_us: Callable[[], int],
        *,
        alone: bool = False,
    ) -> None:
        self.process_id = process_id
        self.living = 1  # processes that share the database, this one among them
        # Held by whoever changes what the database holds for this process, so that it and the purses agree.
        self.lock = asyncio.Lock()
        self._database = database
        self._clock = clock
        self._now_us = now_us
        self._purses: dict[BudgetKey, Purse] = {}
        self._by_scope: dict[Scope, list[BudgetKey]] = {}
        self._alive_until = 0.0  # when others may take this process for dead
        self._beat_at = 0.0
        self._alone = alone
        self._closed = False
        self._filling: set[asyncio.Task[None]] = set()
        self._others: dict[str, tuple[int, float]] = {}  # their beats, and when these were first seen

    def load(self, found: Iterable[Budget], processes: Mapping[str, int]) -> None:
        """The budgets and processes that there are."""
        purses: dict[BudgetKey, Purse] = {}
        for budget in found:
            purse = purses[budget.key] = self._purses.get(budget.key) or Purse(budget.limit_micro)
            if purse.limit_micro != budget.limit_micro:
                purse.limit_micro, purse.refused_until = budget.limit_micro, 0.0
        self._purses, self._by_scope = purses, {}
        for key in purses:
            self._by_scope.setdefault(key.scope, []).append(key)
        now, old = self._clock(), self._others
        self._others = {
            process_id: old[process_id] if old.get(process_id, (-1, 0.0))[0] == beats else (beats, now)
            for process_id, beats in processes.items()
            if process_id != self.process_id
        }
        self.living = 1 + len(self._others)

    def keys_of(self, scopes: Iterable[Scope]) -> list[BudgetKey]:
        """The budgets that a request is charged to."""
        return [key for scope in scopes for key in self._by_scope.get(scope, ())] if self._by_scope else []

    async def reserve(self, keys: Iterable[BudgetKey], amount: int) -> Reservation:
        """Set ``amount`` aside in every budget of ``keys``.

        Raises :class:`BudgetSpentError`, and :class:`StoreError` where a block is too small and the database cannot be
        asked; then nothing is set aside.
        """
        taken: dict[BudgetKey, Purse] = {}
        try:
            for key in keys if amount else ():
                if (purse := self._purses.get(key)) is None:  # removed a moment ago
                    continue
                while not self._enough(purse, amount):
                    await self._fetch(key, purse, amount)
                purse.free -= amount
                purse.out += amount
                purse.idle = False
                taken[key] = purse
                self._fill_ahead(key, purse, amount)
        except BaseException:
            Reservation(taken, amount).settle(0)
            raise
        return Reservation(taken, amount)

    def written(self, spent: Mapping[BudgetKey, int]) -> None:
        """What was spent is used now, for the database too. Call with the lock held."""
        for key, cost in spent.items():
            if purse := self._purses.get(key):
                purse.spent -= cost

    async def beat(self) -> None:
        """Say that this process lives, if it is time to; give back what nobody needed lately; bury the dead.

        Raises :class:`StoreError`.
        """
        if self._clock() < self._beat_at:
            return
        async with self.lock:
            for purse in self._purses.values():
                if purse.idle and purse.free > 0:
                    purse.free = 0
                purse.idle = True
            await self._renew()

    async def give_back(self, scopes: Iterable[Scope]) -> bool:
        """Leave to others what is free here of these budgets; whether anything was. Raises :class:`StoreError`."""
        async with self.lock:
            full = [purse for key in self.keys_of(scopes) if (purse := self._purses.get(key)) and purse.free > 0]
            if not full or self._closed:
                return False
            for purse in full:
                purse.free = 0
            await self._renew()
            return True

    async def close(self) -> None:
        """Give back what is free, and from now on nothing out. Raises :class:`StoreError`.

        What is still out with a request that does not end, or spent and not written, may yet be owed: it stays held,
        as a killed process's does, until others have not heard of this one for long.
        """
        self._closed = True
        for task in self._filling:
            task.cancel()
        async with self.lock:
            self._empty()
            if any(purse.held > 0 for purse in self._purses.values()):
                await self._renew()
            else:
                await self._database.write(lambda connection: budgets.bury(connection, self.process_id))

    def _empty(self) -> None:
        for purse in self._purses.values():
            purse.free = min(purse.free, 0)

    def _enough(self, purse: Purse, amount: int) -> bool:
        return purse.free >= amount and self._clock() < self._alive_until and not self._closed

    async def _fetch(self, key: BudgetKey, purse: Purse, amount: int) -> None:
        """Bring ``amount`` into a purse. Raises :class:`BudgetSpentError`."""
        async with self.lock:
            if self._closed:
                raise StoreError("This server is stopping.")
            if self._clock() >= self._alive_until:
                await self._renew()
            if self._enough(purse, amount):  # another request has just fetched more
                return
            if self._clock() < purse.refused_until and amount - purse.free > purse.refused_room:
                raise spent_error(key, "this request", _HINT)
            await self._take(key, purse, amount - purse.free, amount)
            if purse.free < amount:
                raise spent_error(key, "this request", _HINT)

    async def _take(self, key: BudgetKey, purse: Purse, need: int, amount: int) -> None:
        """Take ``need`` or more from the database, if it is there. Call with the lock held."""
        wish = max(need, amount * _AHEAD_REQUESTS, purse.limit_micro // _AHEAD_PART)
        purse.asked = True
        taken, room = await self._database.write(
            lambda connection: budgets.take(connection, self.process_id, key, need, wish, self._now_us())
        )
        purse.free += taken
        if not taken:
            purse.refused_until, purse.refused_room = self._clock() + _REFUSAL_S, room

    async def _renew(self) -> None:
        """Make the database hold what the purses have. Call with the lock held."""
        began = self._clock()
        if began >= self._alive_until:  # what was free may be others' by now
            self._empty()
        kept = {key: purse.held for key, purse in self._purses.items() if purse.asked}
        dead = {each: beats for each, (beats, seen) in self._others.items() if began - seen >= LIFE_S}

        def work(connection: Connection) -> None:
            budgets.renew(connection, self.process_id, kept)
            if self._alone:
                dead.update(budgets.read_processes(connection))
                dead.pop(self.process_id, None)
            for process_id, beats in dead.items():
                budgets.bury(connection, process_id, beats)

        await self._database.write(work)
        self._alive_until, self._beat_at = began + LIFE_S, began + BEAT_S
        for key, amount in kept.items():
            if renewed := self._purses.get(key):
                renewed.asked = amount > 0

    def _fill_ahead(self, key: BudgetKey, purse: Purse, amount: int) -> None:
        """Fetch more beside the request where the next one of its size might not find enough."""
        if purse.free >= amount or purse.filling or self._clock() < purse.refused_until:
            return
        purse.filling = True

        async def fill() -> None:
            try:
                with contextlib.suppress(StoreError):  # whoever needs it will be told
                    async with self.lock:
                        if purse.free < amount and self._purses.get(key) is purse:
                            await self._take(key, purse, 1, amount)
            finally:
                purse.filling = False

        task = asyncio.get_running_loop().create_task(fill())
        self._filling.add(task)
        task.add_done_callback(self._filling.discard)
