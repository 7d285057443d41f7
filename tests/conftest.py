"""Fixtures for every room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from gale.core.settings import settings
from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_data import SENTENCES, write_jsonl
from tests.tiny_model import make_model, make_tokenizer

SLOW = ("tests/e2e/", "tests/train/test_smoke.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what is broken is known soon."""
    items.sort(key=lambda item: item.nodeid.startswith(SLOW))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Decoder:
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def prepared(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: a split ``train`` of running text and conversations, and a held-out split ``english``."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer.save(folder / "tokenizer")
    texts = [{"text": " ".join(SENTENCES[i:] + SENTENCES[:i])} for i in range(len(SENTENCES))]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in itertools.pairwise(SENTENCES)
    ]
    source = {"licence": "CC0", "origin": "written for this test"}
    recipe = {
        "tokenizer": str(folder / "tokenizer"),
        "sources": [
            {**source, "path": str(write_jsonl(folder / "texts.jsonl", texts))},
            {**source, "path": str(write_jsonl(folder / "chats.jsonl", chats)), "format": "chat"},
            {**source, "path": str(write_jsonl(folder / "held.jsonl", [{"text": SENTENCES[0]}])), "split": "english"},
        ],
    }
    prepare(DataRecipe.model_validate(recipe), folder / "data")
    return folder / "data"


@pytest.fixture
def gale_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GALE_HOME of this test's own."""
    monkeypatch.setenv("GALE_HOME", str(tmp_path / "gale-home"))
    settings.cache_clear()
    yield tmp_path / "gale-home"
    monkeypatch.undo()
    settings.cache_clear()
