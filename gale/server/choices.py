"""Several answers to one request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import TypeVar

from gale.server.disconnect import cancel

Item = TypeVar("Item")

# Answers of one request that the engine has at once, so that one client leaves places for others.
AT_ONCE = 16


async def merged(sources: Iterable[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """The items of all ``sources`` as they come, each with its source's number; those of one source in order.

    The first failure ends all. Every source is closed before this ends, however it ends.
    """
    first, *others = sources
    if not others:  # as nearly always; without a queue it costs a tenth (measured; LOG.md), for every token
        try:
            async for only in first:
                yield 0, only
        finally:
            await first.aclose()
        return
    ready: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue(maxsize=AT_ONCE)
    places = asyncio.Semaphore(AT_ONCE)

    async def run(index: int, source: AsyncGenerator[Item, None]) -> None:
        try:
            async with places:
                async for item in source:
                    await ready.put((index, item))
            await ready.put(None)
        except Exception as error:
            await ready.put(error)
        finally:
            await source.aclose()

    running = [asyncio.create_task(run(index, source)) for index, source in enumerate((first, *others))]
    unfinished = len(running)
    try:
        while unfinished:
            match await ready.get():
                case None:
                    unfinished -= 1
                case Exception() as error:
                    raise error
                case item:
                    yield item
    finally:
        await cancel(*running)
