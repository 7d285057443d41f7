"""A live Gale over the tiny model, called through and compared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from gale.engine.local import LocalEngine
from gale.platform.store import Store
from tests.conformance import scenario
from tests.conformance.checker import Checker
from tests.conformance.parameters import Parameters, probe
from tests.server.live import start
from tests.tiny_model import make_model, make_tokenizer, save_folder

MODEL = "tiny"


@contextmanager
def compared(folder: Path) -> Iterator[tuple[Checker, dict[str, Parameters]]]:
    """Everything that was found; the server keeps its things in ``folder`` and ends with the context."""
    tokenizer = make_tokenizer()
    model = save_folder(tokenizer, folder / MODEL)  # what fine-tuning begins with
    engine = LocalEngine(make_model(tokenizer), tokenizer, model_id=MODEL, folder=model)
    store = Store.open(f"sqlite:///{folder / 'gale.db'}", files=folder / "files")
    server = start(store, engine=engine, home=folder)
    try:
        with httpx2.Client(base_url=server.url, timeout=60) as http:
            checker = Checker(http)
            scenario.run(checker, MODEL)
            yield checker, probe(checker, http)
    finally:
        server.stop()
        asyncio.run(engine.close())
        store.close()
