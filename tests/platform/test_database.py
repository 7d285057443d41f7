"""Opening, migrating and refusing databases."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from gale.core.errors import GaleError, StoreError
from gale.platform.access import LOCAL_OWNER
from gale.platform.database import Database
from gale.platform.store import Store
from gale.platform.tables import metadata


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def test_an_empty_place_becomes_a_migrated_private_database(tmp_path: Path) -> None:
    path = tmp_path / "new folder % é" / "gale.db"
    Store.open(url(path)).close()
    Store.open(url(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with create_engine(url(path)).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_connection_settings(tmp_path: Path) -> None:
    import asyncio

    database = Database.open(url(tmp_path / "gale.db"))
    names = ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")

    async def settings() -> list[object]:
        return await database.read(lambda c: [c.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names])

    assert asyncio.run(settings()) == ["wal", 1, 1, 5000]
    database.close()
    database.close()


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    import asyncio

    from sqlalchemy import Connection

    store = Store.open(url(tmp_path / "gale.db"))

    def work(connection: Connection) -> None:
        connection.exec_driver_sql(
            "INSERT INTO conversations (id, title, created_at, updated_at) VALUES ('conv_1', '', 1, 1)"
        )
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(store.database.write(work))
    assert asyncio.run(store.conversations(LOCAL_OWNER).page()).conversations == []
    store.close()


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gale.db"
    Store.open(url(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer Gale"):
        Store.open(url(path))
    assert path.read_bytes() == before


def test_another_program_s_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        Store.open(url(path))
    assert path.read_bytes() == before


def test_what_is_not_a_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("These are notes, and no database. " * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        Store.open(url(path))
    assert caught.value.hint
    assert path.read_text().startswith("These are notes")


def test_places_where_no_database_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "gale.db", Path("/proc/gale.db"), tmp_path / ("x" * 300)):
        with pytest.raises(StoreError) as caught:
            Store.open(url(place))
        assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file(tmp_path: Path) -> None:
    path = tmp_path / "gale.db"
    Store.open(url(path)).close()
    path.chmod(0o400)
    with pytest.raises(StoreError):
        Store.open(url(path))


@pytest.mark.parametrize(
    "bad", ["", "gale.db", "/tmp/gale.db", "postgresql://u:geheim@h/d", "sqlite:///a?mode=ro", "sqlite://host/a"]
)
def test_addresses_that_are_not_understood(bad: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store.open(bad)
    assert "sqlite:///" in str(caught.value.hint)
    assert "geheim" not in caught.value.message


def test_a_home_of_nobody_is_a_message() -> None:
    with pytest.raises(GaleError, match="~nobody-at-all"):
        Store.open("sqlite:///~nobody-at-all/gale.db")


def _open_and_report(path: Path, results: multiprocessing.Queue[str]) -> None:
    try:
        Store.open(url(path)).close()
        results.put("ok")
    except Exception as error:
        results.put(repr(error))


def test_many_processes_at_once_migrate_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_open_and_report, args=(tmp_path / "gale.db", results)) for _ in range(8)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["ok"] * 8
    for process in processes:
        process.join()
    with sqlite3.connect(tmp_path / "gale.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0005",)]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_migration_cut_short_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gale.platform import database

    def fail(connection: object) -> None:
        database_migrate(connection)  # type: ignore[arg-type]
        raise RuntimeError("power cut")

    database_migrate = database.migrate
    monkeypatch.setattr(database, "migrate", fail)
    with pytest.raises(RuntimeError):
        Store.open(url(tmp_path / "gale.db"))
    monkeypatch.undo()
    with sqlite3.connect(tmp_path / "gale.db") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    Store.open(url(tmp_path / "gale.db")).close()


def test_a_locked_database_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr("gale.platform.database.BUSY_TIMEOUT_S", 0.1)
    store = Store.open(url(tmp_path / "gale.db"))
    other = sqlite3.connect(tmp_path / "gale.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        asyncio.run(store.conversations(LOCAL_OWNER).create())
    assert asyncio.run(store.conversations(LOCAL_OWNER).page()).conversations == []
    other.execute("ROLLBACK")
    asyncio.run(store.conversations(LOCAL_OWNER).create())
    other.close()
    store.close()
