"""What docs/adapters.md tells to type and to send works, over a base and two adapters of its own."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gale.engine.local import LocalEngine
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, start
from tests.tiny_model import save_adapter_folder, save_folder

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def server(store: Store, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """What the page's `gale serve` starts: its folders, opened under its names."""
    root = tmp_path_factory.mktemp("page")
    words = shlex.split(blocks("sh")[0])
    assert words[:3] == ["gale", "serve", "--model"]
    base = save_folder(tokenizer, root / words[3])
    engine = LocalEngine.load(base)
    assert engine.model_id == "base"
    for seed, option in enumerate(words[5::2]):
        name, _, folder = option.partition("=")
        engine.load_adapter(name, save_adapter_folder(base, root / folder, seed=seed))
    live = start(store, engine=engine)
    yield live
    live.stop()
    asyncio.run(engine.close())


def test_the_python_on_the_page_runs(server: Live) -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code.replace("http://127.0.0.1:8000", server.url), names)
    assert names["answer"].model == "poems"
    assert [len(item.embedding) for item in names["vectors"].data] == [32, 32]


def test_the_requests_on_the_page_are_answered_as_it_shows(server: Live) -> None:
    answers = []
    for command in blocks("sh")[1:]:
        _, url, *rest = shlex.split(command)
        body = json.loads(rest[rest.index("-d") + 1])
        response = server.http.post(url.removeprefix("http://127.0.0.1:8000"), json=body)
        assert response.status_code == 200, response.text
        answers.append(response.json())
    shown = json.loads(blocks("json")[0])
    decision, ranking = answers
    assert list(decision) == list(shown)
    assert [list(label) for label in decision["labels"]] == [list(label) for label in shown["labels"]]
    assert len(ranking["results"]) == 2
