"""A live Gale over the tiny model, called through and compared."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import torch

from gale.core.settings import settings
from gale.engine.local import LocalEngine
from gale.model.checkpoint import load_model
from gale.platform.store import Store
from tests.conformance import scenario
from tests.conformance.checker import Checker
from tests.conformance.parameters import Parameters, probe
from tests.server.keyed import make_keys
from tests.server.live import start
from tests.tiny_model import make_tokenizer, save_folder

MODEL = "tiny"


@contextmanager
def compared(folder: Path) -> Iterator[tuple[Checker, dict[str, Parameters]]]:
    """Everything that was found; the server keeps its things in ``folder`` and ends with the context."""
    tokenizer = make_tokenizer()
    model = save_folder(tokenizer, folder / "model")
    engine = LocalEngine(load_model(model, dtype=torch.float32), tokenizer, model_id=MODEL, folder=model)
    # Nothing of the one who runs this is touched: files and jobs lie in GALE_HOME.
    own_home, os.environ["GALE_HOME"] = os.environ.get("GALE_HOME"), str(folder / "home")
    settings.cache_clear()
    store = Store.open(f"sqlite:///{folder / 'gale.db'}")
    keys = make_keys(store)
    server = start(store, engine=engine)
    try:
        with httpx2.Client(base_url=server.url, timeout=60, auth=keys) as http:
            checker = Checker(http)
            scenario.run(checker, MODEL)
            yield checker, probe(checker, http)
    finally:
        server.stop()
        asyncio.run(engine.close())
        store.close()
        del os.environ["GALE_HOME"]
        if own_home is not None:
            os.environ["GALE_HOME"] = own_home
        settings.cache_clear()
