"""What both databases promise: reading, writing, refusing, closing."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from gale.core.errors import GaleError, StoreError
from gale.platform.database import Database
from tests.databases import execute
from tests.platform.rows import count, increment, insert, number, run


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database.open(database_url)
    yield opened
    opened.close()


def test_what_is_written_is_read_in_any_event_loop(database: Database, database_url: str) -> None:
    run(database.write(insert))
    assert run(database.read(count)) == 1
    assert execute(database_url, "SELECT id FROM conversations") == [("conv_1",)]


def test_a_failed_write_changes_nothing(database: Database) -> None:
    def work(connection: Connection) -> None:
        insert(connection)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(database.write(work))
    assert run(database.read(count)) == 0


def test_reading_cannot_write(database: Database) -> None:
    with pytest.raises((StoreError, DBAPIError)):
        run(database.read(insert))
    assert run(database.read(count)) == 0
    run(database.write(insert, durable=True))
    assert run(database.read(count)) == 1


def test_a_broken_constraint_and_a_wrong_statement_are_not_taken_for_a_broken_database(database: Database) -> None:
    run(database.write(insert))
    with pytest.raises(IntegrityError):
        run(database.write(insert))
    with pytest.raises(DBAPIError):
        run(database.write(lambda connection: connection.execute(text("SELEC 1"))))


def test_one_transaction_goes_on_after_a_broken_constraint_inside_a_savepoint(database: Database) -> None:
    def work(connection: Connection) -> int:
        insert(connection)
        with pytest.raises(IntegrityError), connection.begin_nested():
            insert(connection)
        insert(connection, "conv_2")
        return count(connection)

    assert run(database.write(work)) == 2
    assert run(database.read(count)) == 2


def test_foreign_keys_are_enforced(database: Database) -> None:
    statement = (
        "INSERT INTO messages (id, conversation_id, role, content, status, created_at) VALUES ('m', 'x', '', '', '', 0)"
    )
    with pytest.raises(IntegrityError):
        run(database.write(lambda connection: connection.execute(text(statement))))


def test_a_reader_sees_one_state_from_begin_to_end(database: Database, database_url: str) -> None:
    run(database.write(insert))

    def work(connection: Connection) -> tuple[int, int]:
        before = count(connection)
        statement = "INSERT INTO conversations (id, title, created_at, updated_at) VALUES ('c', '', 0, 0)"
        with ThreadPoolExecutor() as pool:  # by another connection
            pool.submit(execute, database_url, statement).result()
        return before, count(connection)

    assert run(database.read(work)) == (1, 1)
    assert run(database.read(count)) == 2


def test_a_hundred_writers_of_one_row_lose_nothing(database: Database) -> None:
    run(database.write(insert))

    async def all_at_once() -> None:
        await asyncio.gather(*(database.write(increment) for _ in range(100)))

    run(all_at_once())
    assert run(database.read(number)) == 100


def _increment_often(url: str) -> None:
    database = Database.open(url)

    async def often() -> None:
        await asyncio.gather(*(database.write(increment) for _ in range(25)))

    asyncio.run(often())
    database.close()


def test_processes_that_write_one_row_lose_nothing(database_url: str) -> None:
    execute(database_url, "INSERT INTO conversations (id, title, created_at, updated_at) VALUES ('c', '', 0, 0)")
    processes = [
        multiprocessing.get_context("fork").Process(target=_increment_often, args=(database_url,)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert execute(database_url, "SELECT created_at FROM conversations") == [(100,)]


def test_closing_waits_for_what_was_handed_over_even_by_a_cancelled_caller(
    database: Database, database_url: str
) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(database.write(insert))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())
    database.close()
    assert execute(database_url, "SELECT count(*) FROM conversations") == [(1,)]
    database.close()
    with pytest.raises(StoreError, match="closed"):
        run(database.read(count))


def test_text_of_every_kind_comes_back_as_it_was(database: Database) -> None:
    words = "中文 é 🎉 ' \" \\ % :x $1 {} \n\t"

    def work(connection: Connection) -> object:
        insert(connection, words)
        return connection.execute(text("SELECT id FROM conversations")).scalar_one()

    assert run(database.write(work)) == words


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "gale.db",
        "/tmp/gale.db",
        "mysql://u:geheim@h/d",
        "postgresql+psycopg://u:geheim@h/d",
        "sqlite:///a?mode=ro",
        "sqlite://host/a",
        "postgresql://u:geheim@h",
        "postgresql://u:geheim@h/d?schema=x",
        "postgresql://u:geheim@h/d?sslmode=maybe",
    ],
)
def test_addresses_that_are_not_understood(bad: str) -> None:
    with pytest.raises(StoreError) as caught:
        Database.open(bad)
    assert caught.value.hint
    assert "geheim" not in caught.value.message


def test_a_home_of_nobody_is_a_message() -> None:
    with pytest.raises(GaleError, match="~nobody-at-all"):
        Database.open("sqlite:///~nobody-at-all/gale.db")
