"""Requests that are many at once, such as a list of texts, beside those of others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")

# How many texts of one request are with the engine at once, so that other requests find places beside them.
AT_ONCE = 8


async def in_turns(work: Sequence[Callable[[], Awaitable[Result]]]) -> list[Result]:
    """The results of ``work`` in its order, :data:`AT_ONCE` at a time. The first failure ends the rest."""
    places = asyncio.Semaphore(AT_ONCE)

    async def run(job: Callable[[], Awaitable[Result]]) -> Result:
        async with places:
            return await job()

    tasks = [asyncio.create_task(run(job)) for job in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
