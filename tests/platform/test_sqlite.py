"""SQLite: its file, its locks, its settings, and what is said when it cannot be used."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from structlog.testing import capture_logs

from gale.core.errors import StoreError
from gale.platform import sqlite
from gale.platform.database import Database
from tests.databases import execute
from tests.platform.rows import count, insert, run


def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gale.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database.open(url(path))
    yield opened
    opened.close()


def test_an_empty_place_becomes_a_private_database(tmp_path: Path) -> None:
    path = tmp_path / "new folder % é" / "gale.db"
    Database.open(url(path)).close()
    Database.open(url(path)).close()
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_database_in_memory() -> None:
    database = Database.open("sqlite://", exclusive=True)
    run(database.write(insert, durable=True))
    assert run(database.read(count)) == 1
    database.close()


def test_connection_settings(database: Database) -> None:
    names = ("journal_mode", "foreign_keys", "synchronous", "query_only")

    def settings(connection: Connection) -> list[object]:
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert run(database.write(settings)) == ["wal", 1, 1, 0]
    assert run(database.read(settings)) == ["wal", 1, 1, 1]
    assert run(database.write(settings, durable=True)) == ["wal", 1, 2, 0]
    assert run(database.write(settings)) == ["wal", 1, 1, 0]


def test_what_is_not_a_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_text("These are notes, and no database. " * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        Database.open(url(path))
    assert caught.value.hint
    assert path.read_text().startswith("These are notes")


def test_places_where_no_database_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "gale.db", Path("/proc/gale.db"), tmp_path / ("x" * 300)):
        with pytest.raises(StoreError) as caught:
            Database.open(url(place), exclusive=True)
        assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file(path: Path) -> None:
    Database.open(url(path)).close()
    path.chmod(0o400)
    with pytest.raises(StoreError):
        Database.open(url(path))


SERVER = """
import sys
from gale.platform.database import Database
database = Database.open(sys.argv[1], exclusive=True)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_server_is_refused_while_the_command_line_still_writes(path: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, url(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        assert server.stdout and b"open\n" in iter(server.stdout.readline, b"")  # past the warning of old versions
        (tmp_path / "another-name.db").symlink_to(path)
        for name in (path, tmp_path / "another-name.db"):
            with pytest.raises(StoreError, match="Another Gale server") as caught:
                Database.open(url(name), exclusive=True)
            assert "PostgreSQL" in str(caught.value.hint)
        command_line = Database.open(url(path))
        run(command_line.write(insert))
        command_line.close()
        server.kill()
    Database.open(url(path), exclusive=True).close()  # a killed one holds nothing
    Database.open(url(path), exclusive=True).close()
    assert execute(url(path), "SELECT count(*) FROM conversations") == [(1,)]


def test_a_server_says_which_sqlite_can_damage_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    with capture_logs() as logs:
        Database.open(url(path), exclusive=True).close()
        Database.open(url(path)).close()
    assert len(logs) == 1
    assert "3.51.3" in logs[0]["event"]
    damaging = [(3, 7, 0), (3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 50, 6), (3, 51, 0), (3, 51, 2)]
    sound = [(3, 44, 6), (3, 50, 7), (3, 51, 3), (3, 52, 0), (4, 0, 0)]
    assert [sqlite._can_damage_wal(version) for version in damaging + sound] == [True] * 7 + [False] * 5


def test_writes_of_two_processes_and_their_checkpoints_never_overlap(database: Database, path: Path) -> None:
    other = Database.open(url(path))
    events: list[str] = []

    def slow(connection: Connection) -> None:
        events.append("begin")
        time.sleep(0.1)
        events.append("end")

    async def both() -> None:
        await asyncio.gather(database.write(slow), other.write(slow))

    run(both())
    other.close()
    assert events == ["begin", "end"] * 2


def test_a_locked_database_is_reported_in_bounded_time(
    database: Database, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.3)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        async def many() -> list[object]:
            return await asyncio.gather(*(database.write(insert) for _ in range(50)), return_exceptions=True)

        began = time.monotonic()
        refused = run(many())
        assert time.monotonic() - began < 10  # and not fifty times 0.3 s, one after another
        assert all(isinstance(error, StoreError) and "locked" in error.message for error in refused)
        assert run(database.read(count)) == 0
        other.execute("ROLLBACK")
    run(database.write(insert))


def test_a_gale_that_writes_for_long_is_reported_too(
    database: Database, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Database.open(url(path))
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.1)

    async def both() -> None:
        long = asyncio.create_task(other.write(lambda connection: time.sleep(1)))
        await asyncio.sleep(0.2)
        with pytest.raises(StoreError, match="locked"):
            await database.write(insert)
        await long
        await database.write(insert)

    run(both())
    other.close()


def fill(connection: Connection) -> None:
    for i in range(200):
        connection.execute(
            text("INSERT INTO conversations (id, title, created_at, updated_at) VALUES (:id, :title, 0, 0)"),
            {"id": f"big_{i}", "title": "x" * 100_000},
        )


def test_a_full_disk_loses_nothing_old_and_is_over_when_there_is_space(database: Database) -> None:
    run(database.write(insert))

    def limit(pages: int) -> None:
        run(database.read(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}").scalar()))

    limit(200)
    with pytest.raises(StoreError, match="full") as caught:
        run(database.write(fill))
    assert "space" in str(caught.value.hint)
    assert run(database.read(count)) == 1
    limit(1_000_000)
    run(database.write(fill))
    assert run(database.read(count)) == 201


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    database = Database.open(url(small_disk / "gale.db"))
    run(database.write(insert))
    (small_disk / "ballast").write_bytes(b"x" * 1_000_000)
    with pytest.raises(StoreError) as caught:
        run(database.write(fill))
    assert caught.value.hint
    assert run(database.read(count)) == 1
    (small_disk / "ballast").unlink()
    run(database.write(lambda connection: insert(connection, "conv_2")))
    assert run(database.read(count)) == 2
    database.close()
    assert execute(url(small_disk / "gale.db"), "PRAGMA integrity_check") == [("ok",)]
