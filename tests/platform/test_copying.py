"""A copied store is the whole store or none: what stands in its way, what a row may hold, and kills in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Integer, select
from sqlalchemy.exc import StatementError

from gale.core.errors import StoreError
from gale.platform import copying
from gale.platform.database import Database
from gale.platform.tables import metadata
from tests.databases import PostgresqlServer, execute, kill_once

processes = multiprocessing.get_context("fork")


@pytest.fixture
def source(sqlite_template: Path, tmp_path: Path) -> str:
    """A store with a conversation of three messages, the last of which lies first in the file."""
    shutil.copy(sqlite_template, tmp_path / "source.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "source.db", isolation_level=None)) as file:
        file.execute("INSERT INTO conversations (id, title, created_at, updated_at) VALUES ('conv_1', 'a', 1, 1)")
        for name, parent in (("msg_3", "msg_2"), ("msg_2", "msg_1"), ("msg_1", None)):
            file.execute(
                "INSERT INTO messages (id, conversation_id, parent_id, role, content, status, created_at) "
                "VALUES (?, 'conv_1', ?, 'user', 'hello', 'complete', 1)",
                (name, parent),
            )
    return f"sqlite:///{tmp_path / 'source.db'}"


def rows_of(url: str) -> dict[str, list[str]]:
    """All that is in a database, table by table."""
    with opened(url) as database:
        return asyncio.run(
            database.read(
                lambda connection: {
                    table.name: sorted(repr(tuple(row)) for row in connection.execute(select(table)))
                    for table in metadata.sorted_tables
                }
            )
        )


@contextlib.contextmanager
def opened(url: str) -> Iterator[Database]:
    with contextlib.closing(Database.open(url, exclusive=True)) as database:
        yield database


def copy(source: str, target: str) -> copying.Counts:
    with opened(source) as first, opened(target) as second:
        return asyncio.run(copying.copy(first, second))


def test_every_row_arrives_those_that_others_refer_to_first(source: str, empty_database_url: str) -> None:
    before = rows_of(source)
    counts = copy(source, empty_database_url)
    assert counts["messages"] == 3
    assert counts == {name: len(rows) for name, rows in before.items()}
    assert rows_of(empty_database_url) == rows_of(source) == before


def test_more_rows_than_travel_at_once(source: str, empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BATCH_ROWS", 7)
    with contextlib.closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as file, file:
        file.executemany(
            "INSERT INTO usage_events VALUES (?, 1, 'o', 'p', NULL, NULL, 'm', 'k', 0, 1, 2, 3, 4, 5, NULL)",
            [(f"u{number}",) for number in range(100)],
        )
    assert copy(source, empty_database_url)["usage_events"] == 100
    assert rows_of(empty_database_url) == rows_of(source)


def test_json_is_copied_to_the_letter(source: str, postgresql: PostgresqlServer, tmp_path: Path) -> None:
    written = r'{"b": "\u0000\ud800", "a": 1.10, "n": 123456789012345678901234567890, "t": true}'
    execute(
        source,
        "INSERT INTO response_conversations (id, project_id, metadata, created_at) "
        f"VALUES ('conv_2', 'proj_default', '{written}', 9007199254740993)",
    )
    for name, scopes in (("key_1", "NULL"), ("key_2", "'null'")):
        execute(
            source,
            "INSERT INTO api_keys (id, organisation_id, user_id, name, prefix, last4, digest, scopes, created_at) "
            f"VALUES ('{name}', 'org_default', 'user_first', 'k', 'p', 'l', x'00ff{name[-1:]}0', {scopes}, 1)",
        )
    with postgresql.database() as url:
        copy(source, url)
        back = f"sqlite:///{tmp_path / 'back.db'}"
        copy(url, back)
        for place in (url, back):
            as_text = "::text" if place == url else ""
            question = f"SELECT metadata{as_text}, created_at FROM response_conversations"
            assert execute(place, question) == [(written, 9007199254740993)]
            assert execute(place, "SELECT id FROM api_keys WHERE scopes IS NULL") == [("key_1",)]
        assert execute(back, "SELECT hex(digest) FROM api_keys ORDER BY id") == [("00FF10",), ("00FF20",)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE conversations SET title = 'a' || char(0)", r"conversations \(id 'conv_1'\).* title holds a NUL"),
        ("UPDATE conversations SET title = x'61ff'", "title is not text"),
        ("UPDATE conversations SET title = CAST(x'61ff' AS TEXT)", "conversations holds what is no text"),
        ("UPDATE conversations SET created_at = 'soon'", "created_at is not a whole number"),
        ("UPDATE messages SET prompt_tokens = 2147483648 WHERE id = 'msg_2'", "'msg_2'.* prompt_tokens is not a whole"),
        (
            "INSERT INTO response_conversations VALUES ('conv_2', 'proj_default', '{\"a\": NaN}', 1)",
            "metadata is not JSON",
        ),
    ],
)
def test_a_row_that_not_every_database_can_keep_is_named_and_nothing_copied(
    source: str, empty_database_url: str, change: str, said: str
) -> None:
    execute(source, change)
    Database.open(empty_database_url).close()
    before = rows_of(empty_database_url)
    with pytest.raises(StoreError, match=said):
        copy(source, empty_database_url)
    assert rows_of(empty_database_url) == before


def test_rows_that_refer_to_nothing_are_found(source: str, empty_database_url: str) -> None:
    for change, said in (
        ("UPDATE messages SET parent_id = 'msg_1' WHERE id = 'msg_1'", "Of 3 rows of messages 0 arrived"),
        ("UPDATE messages SET parent_id = NULL, conversation_id = 'nowhere'", "messages do not fit together"),
    ):
        execute(source, change)  # past Gale, without its foreign keys
        with pytest.raises(StoreError, match=said):
            copy(source, empty_database_url)


@pytest.mark.parametrize(
    "change",
    [
        "INSERT INTO prices VALUES ('m', 1, 1, 1)",
        "UPDATE organisations SET name = 'Acme'",
        "UPDATE users SET claimed_at = 1",
        "INSERT INTO organisations VALUES ('org_z', 'Default organisation', 1)",
        "DELETE FROM memberships",
    ],
)
def test_a_target_that_holds_anything_is_refused_and_left_alone(source: str, database_url: str, change: str) -> None:
    execute(database_url, change)
    before = rows_of(database_url)
    with pytest.raises(StoreError, match="holds data already"):
        copy(source, database_url)
    assert rows_of(database_url) == before


def _copy_until(source: str, target: str, table: str, reached: Path) -> None:
    insert = copying._insert

    def pause(connection: Any, at: Any, rows: Any) -> None:
        insert(connection, at, rows)
        if at.name == table:
            reached.touch()
            time.sleep(60)

    copying._insert = pause
    copy(source, target)


def test_a_copy_that_is_killed_leaves_an_empty_target_and_the_source_as_it_was(
    source: str, empty_database_url: str, tmp_path: Path
) -> None:
    before, reached = rows_of(source), tmp_path / "reached"
    process = processes.Process(target=_copy_until, args=(source, empty_database_url, "messages", reached))
    process.start()
    kill_once(process, reached)
    assert rows_of(empty_database_url)["messages"] == []
    assert rows_of(source) == before
    copy(source, empty_database_url)
    assert rows_of(empty_database_url) == before


def test_a_copy_that_is_interrupted_ends_at_once_and_leaves_an_empty_target(
    source: str, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, reached, go_on = copying._insert, threading.Event(), threading.Event()

    def pause(connection: Any, at: Any, rows: Any) -> None:
        insert(connection, at, rows)
        reached.set()
        assert go_on.wait(60)

    monkeypatch.setattr(copying, "_insert", pause)

    async def interrupted(first: Database, second: Database) -> None:
        copied = asyncio.create_task(copying.copy(first, second))
        assert await asyncio.to_thread(reached.wait, 60)
        copied.cancel()  # as Ctrl-C does
        with pytest.raises(asyncio.CancelledError):
            await copied
        go_on.set()

    with opened(source) as first, opened(empty_database_url) as second:
        asyncio.run(interrupted(first, second))
    monkeypatch.undo()
    assert copy(source, empty_database_url)["messages"] == 3


def test_a_target_that_is_lost_in_the_middle_is_not_filled_from_there_on(
    source: str, postgresql: PostgresqlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = copying._insert

    def cut(connection: Any, at: Any, rows: Any) -> None:
        if at.name == "messages":
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        insert(connection, at, rows)

    with postgresql.database() as url:
        with monkeypatch.context() as broken:
            broken.setattr(copying, "_insert", cut)
            with pytest.raises(StoreError, match="lost or changed by others"):
                copy(source, url)
        assert rows_of(url)["conversations"] == []
        copy(source, url)
        assert rows_of(url) == rows_of(source)


def test_on_postgresql_nobody_else_may_be_connected(
    source: str, postgresql: PostgresqlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_OTHERS_LEAVE_S", 0.3)
    with postgresql.database() as url, contextlib.closing(Database.open(url)) as server:
        asyncio.run(server.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar()))
        with pytest.raises(StoreError, match="connected to the target"):
            copy(source, url)
        with pytest.raises(StoreError, match="connected to the source"):
            copy(url, f"sqlite:///{tmp_path / 'back.db'}")


def test_no_table_counts_by_itself() -> None:
    """Such a column's sequence would have to be set behind what was copied."""
    counting = [table.name for table in metadata.sorted_tables if table.autoincrement_column is not None]
    assert counting == [table.name for table in metadata.sorted_tables if _has_number_for_key(table)] == []


def _has_number_for_key(table: Any) -> bool:
    return [isinstance(column.type, Integer) for column in table.primary_key] == [True]


def test_what_is_no_json_is_refused_by_both_kinds(database_url: str) -> None:
    """SQLite would keep NaN, which is not JSON, and no answer could be made of it."""
    table = metadata.tables["response_conversations"]
    row = {"id": "conv_1", "project_id": "proj_default", "metadata": {"a": float("nan")}, "created_at": 1}
    with opened(database_url) as database, pytest.raises(StatementError, match="not JSON compliant"):
        asyncio.run(database.write(lambda connection: connection.execute(table.insert().values(row))))
