"""What a step says reaches every event loop in order, and a loop that is gone takes nothing from the others."""

from __future__ import annotations

import asyncio

from gale.engine.outbox import Outbox


def test_events_arrive_in_order_once_they_are_sent_and_a_closed_loop_hinders_nobody() -> None:
    gone = asyncio.new_event_loop()
    gone.close()
    outbox, heard = Outbox(), []

    async def listen() -> list[int]:
        loop = asyncio.get_running_loop()
        outbox.put(gone, heard.append, 0)
        for event in range(1, 4):
            outbox.put(loop, heard.append, event)
        await asyncio.sleep(0)
        before = list(heard)
        outbox.send()
        outbox.send()
        await asyncio.sleep(0.01)
        return before

    assert asyncio.run(listen()) == []
    assert heard == [1, 2, 3]
