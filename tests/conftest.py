"""Fixtures for every room."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gale.core.settings import settings
from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.model.transformer import Decoder
from gale.platform.database import Database
from gale.text.tokenizer import Tokenizer
from tests.databases import REASON, PostgresqlServer, address, programs
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


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A running PostgreSQL server."""
    folder = programs()
    if folder is None:
        if os.environ.get("CI") == "true":
            pytest.fail(REASON)
        pytest.skip(REASON)
    server = PostgresqlServer(folder)
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file."""
    path = tmp_path_factory.mktemp("template") / "gale.db"
    Database.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def postgresql_template(postgresql: PostgresqlServer) -> Iterator[str]:
    """The name of a migrated, empty PostgreSQL database."""
    with postgresql.database() as url:
        Database.open(url).close()
        yield url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a migrated, empty database: the test runs on both kinds."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "gale.db")
        yield f"sqlite:///{tmp_path / 'gale.db'}"
        return
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    with server.database(request.getfixturevalue("postgresql_template")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a database without tables (an SQLite file is not even there)."""
    with address(request, tmp_path) as url:
        yield url
