"""Events on their way from the engine's thread to those who wait: all of a step in one call for each event loop.

A call wakes the loop, which costs a system call and a change of threads; with many answers that adds up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

_Delivery = tuple[Callable[[Any], None], Any]


class Outbox:
    """What :meth:`put` takes goes out with the next :meth:`send`; both are called in the engine's thread."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Any], None], event: object) -> None:
        """``receive`` will be called with ``event`` in ``loop``, in the order of putting."""
        self._waiting.setdefault(loop, []).append((receive, event))

    def send(self) -> None:
        """Hand everything over."""
        waiting, self._waiting = self._waiting, {}
        for loop, deliveries in waiting.items():
            with contextlib.suppress(RuntimeError):  # it is closed: the server stops in the middle of an answer
                loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[_Delivery]) -> None:
    for receive, event in deliveries:
        receive(event)
