"""`gale` with an engine of at most thirty steps a second, so that a person's hand and a browser can keep up with it."""

import time

from gale.cli.main import main
from gale.engine.batcher import Batcher

step = Batcher.step


def slow_step(self: Batcher) -> None:
    time.sleep(1 / 30)
    step(self)


Batcher.step = slow_step  # type: ignore[method-assign]
main()
