"""Look-ups of many callers in few reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MOST_AT_ONCE = 500


class Together(Generic[Key, Value]):
    """Looks keys up with ``find``, which is given those that came while it was busy, up to 500, in one call.

    So one call is under way at a time, and nobody waits for more than the one before. Belongs to one event loop.
    """

    def __init__(self, find: Callable[[Sequence[Key]], Awaitable[Mapping[Key, Value]]]) -> None:
        self._find = find
        self._waiting: list[tuple[Key, asyncio.Future[Value | None]]] = []
        self._finding: asyncio.Task[None] | None = None

    async def get(self, key: Key) -> Value | None:
        """What ``find`` has for ``key``, if anything. Raises what ``find`` does."""
        future: asyncio.Future[Value | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, future))
        if self._finding is None or self._finding.done():
            self._finding = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
            try:
                found = await self._find([key for key, _ in now])
            except Exception as error:
                for _, future in now:
                    if not future.done():
                        future.set_exception(error)
                continue
            for key, future in now:
                if not future.done():  # whoever asked may have left
                    future.set_result(found.get(key))
