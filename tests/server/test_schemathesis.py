"""schemathesis reads our own OpenAPI document and sends what it finds there, valid and not: nothing answers with 5xx.

Whatever fails carries OpenAI's error envelope (Anthropic's for its own routes).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis

# Loaded here and not when it is first needed: pytest parses it, and while another thread parses too (the server's),
# Python 3.11 can fail with "AST constructor recursion depth mismatch".
import schemathesis.specs.openapi.schemas
from hypothesis import HealthCheck, Phase, given, settings

from gale.engine.local import LocalEngine
from gale.model.transformer import Decoder
from gale.platform.secret import Secret
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.server.keyed import Keys, make_keys
from tests.server.live import Live, start

EXAMPLES = 12


@pytest.fixture
def keyed(tmp_path: Path, gale_home: Path, model: Decoder, tokenizer: Tokenizer) -> Iterator[tuple[Live, Keys]]:
    """A server of its own, as what is sent may make accounts, and whoever makes the first has to have a key then."""
    url = f"sqlite:///{tmp_path / 'gale.db'}"
    store, engine = (
        Store.open(url, files=tmp_path, secret=Secret(b"s" * 32)),
        LocalEngine(model, tokenizer, model_id="tiny"),
    )
    keys = make_keys(store)
    server = start(store, engine=engine)
    yield server, keys
    server.stop()
    asyncio.run(engine.close())
    store.close()


@pytest.mark.slow
def test_nothing_answers_with_a_server_error(keyed: tuple[Live, Keys]) -> None:
    server, keys = keyed
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=keys.headers("/openapi.json"))
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            headers = {**(case.headers or {}), **keys.headers(case.operation.path)}
            response = case.call(timeout=60, headers=headers)
            assert response.status_code < 500, f"{case.operation.label}: {response.text[:500]}"
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        send()
