"""Noticing that the client has left, or that we are about to.

No server cancels the handler of an ordinary (not streamed) request when its client disconnects, so a model would go
on writing for nobody unless we watch for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from gale.server.errors import ApiError
from gale.server.lifecycle import Lifecycle

Result = TypeVar("Result")


async def client_gone(receive: Receive) -> None:
    """Return when the client has disconnected. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_wanted(receive: Receive, lifecycle: Lifecycle, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled if the client leaves or the server stops first.

    Raises :class:`ApiError` 499 or 503 then.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(client_gone(receive))
    stopping = asyncio.create_task(lifecycle.grace_over())
    try:
        await asyncio.wait((working, leaving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ApiError(499, "The client closed the request.", code="client_disconnected")
        raise ApiError(503, "The server is shutting down.", code="server_shutting_down")
    finally:
        await cancel(working, leaving, stopping)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up; what they raise is not of interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
