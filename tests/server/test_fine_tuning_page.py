"""What docs/fine-tuning.md tells to type works, in both languages, which have the same code."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gale.engine.local import LocalEngine
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, start
from tests.tiny_model import save_folder

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    """The fenced Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def server(tokenizer: Tokenizer, gale_home: Path) -> Iterator[Live]:
    engine = LocalEngine.load(save_folder(tokenizer, gale_home / "tiny"))
    store = Store.open(f"sqlite:///{gale_home / 'gale.db'}")
    live = start(store, engine=engine)
    yield live
    live.stop()
    asyncio.run(engine.close())
    store.close()


def test_both_languages_have_the_same_code() -> None:
    assert blocks("fine-tuning.md") == blocks("fine-tuning.zh.md")


@pytest.mark.slow
def test_the_python_on_the_page_runs(server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in blocks("fine-tuning.md"):
        exec(code.replace("http://127.0.0.1:8000", server.url).replace("rows.jsonl", f"{tmp_path}/rows.jsonl"), names)
    assert names["job"].status == "succeeded"
    said = capsys.readouterr().out
    assert "The job has successfully completed" in said and "ft:tiny:default-organisation:desk:" in said
