"""What is over is removed, once at the start and then every few minutes."""

from __future__ import annotations

import asyncio

import structlog

from gale.core.errors import GaleError
from gale.platform.store import Store

EVERY_S = 600.0
log = structlog.get_logger("gale.server")


async def keep_house(store: Store) -> None:
    """Until cancelled."""
    while True:
        try:
            await store.sweep()
        except (GaleError, OSError) as error:  # a database or a disk that may be back the next time
            log.warning("could not clean up", reason=str(error))
        await asyncio.sleep(EVERY_S)
