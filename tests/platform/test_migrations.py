"""Databases get their present shape once, wholly or not at all, on both kinds."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from gale.core.errors import StoreError
from gale.platform import migrate
from gale.platform.database import Database
from gale.platform.tables import metadata
from tests.databases import execute, kill_once

processes = multiprocessing.get_context("fork")
NEWEST = ScriptDirectory(str(migrate.MIGRATIONS)).get_current_head()

_STEP = """
from alembic import op
revision = "9000"
down_revision = "{newest}"

def upgrade():
    op.execute("CREATE TABLE step_one (a INTEGER)")
    op.execute("UPDATE conversations SET title = 'changed'")
    {middle}
    op.execute("CREATE TABLE step_two (a INTEGER)")
"""


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this Gale a version that has one more step."""

    def make(middle: str = "pass") -> None:
        folder = tmp_path / f"migrations-{time.monotonic_ns()}"
        shutil.copytree(migrate.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / "v9000_next.py").write_text(_STEP.format(newest=NEWEST, middle=middle))
        monkeypatch.setattr(migrate, "MIGRATIONS", folder)

    return make


def revisions(url: str) -> list[tuple[Any, ...]]:
    return execute(url, "SELECT version_num FROM alembic_version")


def tables(url: str) -> set[str]:
    if url.startswith("sqlite"):
        return {name for (name,) in execute(url, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {name for (name,) in execute(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def test_the_steps_build_what_the_code_uses(empty_database_url: str) -> None:
    database = Database.open(empty_database_url)
    difference = asyncio.run(
        database.read(lambda connection: compare_metadata(MigrationContext.configure(connection), metadata))
    )
    database.close()
    assert difference == []
    Database.open(empty_database_url).close()
    assert revisions(empty_database_url) == [(NEWEST,)]


def test_a_newer_database_is_refused_and_left_alone(database_url: str) -> None:
    execute(database_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="newer Gale"):
        Database.open(database_url)
    assert revisions(database_url) == [("9999",)]


def test_another_program_s_database_is_refused_and_left_alone(empty_database_url: str) -> None:
    execute(empty_database_url, "CREATE TABLE theirs (a INTEGER)")
    with pytest.raises(StoreError, match="another program"):
        Database.open(empty_database_url)
    assert tables(empty_database_url) == {"theirs"}


def _open_and_report(url: str, results: Queue[str]) -> None:
    try:
        Database.open(url).close()
        results.put("ok")
    except Exception as error:
        results.put(repr(error))


def test_ten_processes_at_once_migrate_once(empty_database_url: str) -> None:
    results: Queue[str] = processes.Queue()
    started = [processes.Process(target=_open_and_report, args=(empty_database_url, results)) for _ in range(10)]
    for process in started:
        process.start()
    assert [results.get(timeout=120) for _ in started] == ["ok"] * 10
    for process in started:
        process.join()
    assert revisions(empty_database_url) == [(NEWEST,)]


def test_a_step_that_fails_leaves_the_old_shape(database_url: str, next_version: Callable[..., None]) -> None:
    before = tables(database_url)
    next_version("raise RuntimeError('power cut')")
    with pytest.raises(RuntimeError):
        Database.open(database_url)
    assert tables(database_url) == before
    assert revisions(database_url) == [(NEWEST,)]
    next_version()
    Database.open(database_url).close()
    assert tables(database_url) - before == {"step_one", "step_two"}


def test_a_process_killed_in_a_step_leaves_the_old_shape(
    database_url: str, next_version: Callable[..., None], tmp_path: Path
) -> None:
    execute(database_url, "INSERT INTO conversations (id, title, created_at, updated_at) VALUES ('c', 'old', 0, 0)")
    before = tables(database_url)
    reached = tmp_path / "reached"
    next_version(f"import pathlib, time; pathlib.Path({str(reached)!r}).touch(); time.sleep(60)")
    process = processes.Process(target=_open_and_report, args=(database_url, processes.Queue()))
    process.start()
    kill_once(process, reached)
    assert tables(database_url) == before
    assert execute(database_url, "SELECT title FROM conversations") == [("old",)]
    next_version()
    Database.open(database_url).close()
    assert revisions(database_url) == [("9000",)]
    assert execute(database_url, "SELECT title FROM conversations") == [("changed",)]


def test_an_older_sqlite_file_is_copied_before_it_changes(
    sqlite_template: Path, tmp_path: Path, next_version: Callable[..., None]
) -> None:
    path = tmp_path / "gale.db"
    shutil.copy(sqlite_template, path)
    (tmp_path / "gale.db.before-0000").touch()
    url = f"sqlite:///{path}"
    execute(url, "INSERT INTO conversations (id, title, created_at, updated_at) VALUES ('c', 'old', 0, 0)")
    Database.open(url).close()
    assert (tmp_path / "gale.db.before-0000").exists()  # nothing was to be done
    next_version()
    Database.open(url).close()
    copy = tmp_path / "gale.db.before-9000"
    assert sorted(file.name for file in tmp_path.glob("*gale.db*")) == ["gale.db", copy.name, "gale.db.write-lock"]
    assert copy.stat().st_mode & 0o777 == 0o600
    assert execute(f"sqlite:///{copy}", "SELECT title FROM conversations") == [("old",)]
    assert revisions(f"sqlite:///{copy}") == [(NEWEST,)]
    assert execute(url, "SELECT title FROM conversations") == [("changed",)]


def test_without_room_for_the_copy_nothing_changes(
    sqlite_template: Path, tmp_path: Path, next_version: Callable[..., None]
) -> None:
    path = tmp_path / "gale.db"
    shutil.copy(sqlite_template, path)
    (tmp_path / "gale.db.before-9000").mkdir()
    next_version()
    with pytest.raises(StoreError, match="No copy"):
        Database.open(f"sqlite:///{path}")
    assert revisions(f"sqlite:///{path}") == [(NEWEST,)]
