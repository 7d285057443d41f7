"""Responses that are answered while nobody waits for them: how many, for whom, and until when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from gale.core.errors import StoreError
from gale.engine.request import EngineOverloadedError
from gale.platform.access import Actor
from gale.platform.clock import now_us
from gale.platform.identities import may_go_on
from gale.platform.responses import tidy
from gale.platform.store import Store
from gale.server.disconnect import cancel

log = structlog.get_logger("gale.server.background")

MOST_RUNNING = 256
TIDY_EVERY_S = 3600.0
# With the time it takes to ask and to stop, within the 5 seconds that are promised for open streams.
CHECK_RIGHTS_EVERY_S = 2.0


class Answering(Protocol):
    """A response while it is being answered."""

    async def to_end(self) -> None:
        """Answer, and keep what it came to; where this is cancelled too."""

    def access_ended(self) -> None:
        """Say in the response why it is about to be cancelled."""


@dataclass(frozen=True, slots=True)
class _Running:
    task: asyncio.Task[None]
    answering: Answering
    actor: Actor


class Background:
    """The responses of one server. Belongs to one event loop; :meth:`run` has to go on beside it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: dict[str, _Running] = {}
        self._beginning = 0

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Within it one more can be begun. Raises :class:`EngineOverloadedError` where there are too many."""
        if len(self._running) + self._beginning >= MOST_RUNNING:
            raise EngineOverloadedError("Too many responses are being answered in the background.")
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1

    def begin(self, response_id: str, answering: Answering, actor: Actor) -> None:
        """Answer it for ``actor``, as long as they may ask."""
        task = asyncio.create_task(answering.to_end())
        self._running[response_id] = _Running(task, answering, actor)
        task.add_done_callback(lambda _: self._running.pop(response_id, None))

    async def cancel(self, response_id: str) -> None:
        """Stop answering it, if it is answered here, and return when what there is of it is kept."""
        if (running := self._running.get(response_id)) is not None:
            await cancel(running.task)

    async def run(self) -> None:
        """Forget old responses every hour, and stop those whose time is over; all of them when this is cancelled."""
        tasks = [asyncio.create_task(self._keep_tidy()), asyncio.create_task(self._check_rights())]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel(*tasks, *(running.task for running in self._running.values()))

    async def _keep_tidy(self) -> None:
        began = now_us()
        while True:
            try:
                await tidy(self._store.database, unfinished_before=began - int(TIDY_EVERY_S * 1e6))
            except StoreError as error:
                log.warning("responses_not_tidied", reason=error.message)
            await asyncio.sleep(TIDY_EVERY_S)
            began = now_us()

    async def _check_rights(self) -> None:
        while True:
            await asyncio.sleep(CHECK_RIGHTS_EVERY_S)
            # As with open streams: that a key was revoked could not have been written down either.
            try:
                lost = await self._lost_rights()
            except StoreError as error:
                log.warning("rights_not_checked", reason=error.message)
                continue
            ended = [running for running in self._running.values() if running.actor in lost]
            for running in ended:
                running.answering.access_ended()
            await cancel(*(running.task for running in ended))

    async def _lost_rights(self) -> set[Actor]:
        """Of those for whom something is answered, who may not go on."""
        actors = {running.actor for running in self._running.values()}
        if not actors:
            return set()
        return await self._store.database.read(
            lambda connection: {actor for actor in actors if not may_go_on(connection, actor)}
        )
