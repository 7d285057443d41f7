"""Whether the server is taking requests, told to everything that has to end when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Lifecycle:
    """Shared by the edge, the health checks and the open streams of one application."""

    def __init__(self, grace_s: float = 2.0) -> None:
        self.grace_s = grace_s
        self._draining = asyncio.Event()
        # Work that goes on beside requests, such as batches: begun with the server in this order. After the last
        # request has ended it ends in reverse, each cancelled and waited for before the next: what stands further back
        # uses what stands before it, and metering, the first, is there until all that was used is known.
        self.background: list[Callable[[], Awaitable[None]]] = []

    @property
    def draining(self) -> bool:
        """True once the server was told to stop: nothing new is begun."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Begin to stop. Call from the event loop."""
        self._draining.set()

    async def grace_over(self) -> None:
        """Return when open streams have had ``grace_s`` seconds since :meth:`drain`."""
        await self._draining.wait()
        await asyncio.sleep(self.grace_s)
