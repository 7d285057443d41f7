"""PostgreSQL: collisions, a server that goes away, limits, and what is said when it cannot be used."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, make_url, text

from gale.core.errors import StoreError
from gale.platform import postgresql as module
from gale.platform.database import Database
from tests.databases import PASSWORD, PostgresqlServer, execute
from tests.platform.rows import count, increment, insert, number, run

SLEEP = text("SELECT pg_sleep(3)")


@pytest.fixture
def url(postgresql: PostgresqlServer, postgresql_template: str) -> Iterator[str]:
    with postgresql.database(postgresql_template) as address:
        yield address


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database.open(url)
    yield opened
    opened.close()


def test_servers_that_cannot_be_used(postgresql: PostgresqlServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 2.0)
    good = make_url(url)
    for wrong, message in [
        (good.set(port=1), "cannot be reached"),
        (good.set(host="nowhere.invalid"), "host is not known|does not answer"),
        (good.set(password="falsch-geheim"), "password authentication failed"),
        (good.set(database="nothing"), "does not exist"),
        (good.set(query={"host": "/nowhere"}), "cannot be reached"),
        (good.set(query={"sslmode": "require"}), "SSL"),
    ]:
        with pytest.raises(StoreError, match=message) as caught:
            Database.open(wrong.render_as_string(hide_password=False))
        assert caught.value.hint
        assert PASSWORD not in str(caught.value)


def test_addresses_as_others_write_them(url: str) -> None:
    for scheme in ("postgresql", "postgres"):
        Database.open(url.replace("postgresql+asyncpg", scheme) + "?sslmode=prefer").close()


def test_a_database_that_the_user_may_not_change(postgresql: PostgresqlServer) -> None:
    with postgresql.database() as url:
        execute(url, f"CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}'")
        try:
            with pytest.raises(StoreError, match="permission denied") as caught:
                Database.open(make_url(url).set(username="plain").render_as_string(hide_password=False))
            assert "OWNER" in str(caught.value.hint)
        finally:
            execute(url, "DROP ROLE plain")


def test_an_encoding_without_every_language_is_refused(postgresql: PostgresqlServer) -> None:
    execute(postgresql.url(), "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    try:
        with pytest.raises(StoreError, match="LATIN1"):
            Database.open(postgresql.url("latin"))
    finally:
        execute(postgresql.url(), "DROP DATABASE latin")


def test_what_was_read_still_holds_when_it_is_written(database: Database, url: str) -> None:
    other = Database.open(url)
    both_have_read = threading.Barrier(2)
    attempts: list[int] = []

    def insert_the_first(connection: Connection) -> None:
        found = count(connection)
        attempts.append(found)
        if len(attempts) <= 2:
            both_have_read.wait(timeout=30)
        if found == 0:
            insert(connection, f"conv_{threading.get_ident()}")

    async def both() -> None:
        await asyncio.gather(database.write(insert_the_first), other.write(insert_the_first))

    run(both())
    other.close()
    assert attempts == [0, 0, 1]  # one of them ran again and saw what the other had done
    assert execute(url, "SELECT count(*) FROM conversations") == [(1,)]


def test_a_collision_without_end_is_given_up(database: Database, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(database.write(insert))
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)

    def collide(connection: Connection) -> None:
        number(connection)
        stranger = threading.Thread(target=execute, args=(url, "UPDATE conversations SET created_at = created_at + 1"))
        stranger.start()
        stranger.join()
        increment(connection)

    with pytest.raises(StoreError, match="could not serialize") as caught:
        run(database.write(collide))
    assert caught.value.hint


def test_rows_that_another_program_locks_are_not_waited_for_without_end(database: Database, url: str) -> None:
    other = Database.open(url)
    run(database.write(insert))

    def lock(connection: Connection) -> None:
        increment(connection)
        connection.execute(SLEEP)

    def impatiently(connection: Connection) -> None:
        connection.execute(text("SET LOCAL lock_timeout = 300"))
        increment(connection)

    async def both() -> None:
        holding = asyncio.create_task(other.write(lock))
        await asyncio.sleep(0.5)
        with pytest.raises(StoreError, match="lock timeout"):
            await database.write(impatiently)
        await holding

    run(both())
    other.close()


def test_a_busy_pool_is_a_message_in_bounded_time_and_recovers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "CONNECTIONS", 2)
    database = Database.open(url)

    async def many() -> list[object]:
        return await asyncio.gather(
            *(database.read(lambda connection: connection.execute(SLEEP).scalar()) for _ in range(6)),
            *(database.write(lambda connection: connection.execute(SLEEP).scalar()) for _ in range(2)),
            return_exceptions=True,
        )

    results = run(many())
    refused = [result for result in results if isinstance(result, StoreError)]
    assert len(results) - len(refused) == 2
    assert all("more to do than it can" in error.message and error.hint for error in refused)
    assert run(database.read(count)) == 0
    database.close()


def test_writes_behind_one_that_takes_too_long_are_told_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_TIMEOUT_S", 0.3)

    async def both() -> None:
        long = asyncio.create_task(database.write(lambda connection: connection.execute(SLEEP).scalar()))
        await asyncio.sleep(0.1)
        with pytest.raises(StoreError, match="more to do"):
            await database.write(insert)
        await long
        await database.write(insert)

    run(both())


def test_no_session_stays_in_a_transaction(database: Database, url: str) -> None:
    async def several() -> None:
        await asyncio.gather(*(database.read(count) for _ in range(20)), database.write(insert))

    run(several())
    states = execute(url, "SELECT DISTINCT state FROM pg_stat_activity WHERE application_name = 'gale'")
    assert states == [("idle",)]


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_restarted_server_is_found_again(
    database: Database, url: str, postgresql: PostgresqlServer, mode: str
) -> None:
    async def several() -> None:
        await asyncio.gather(*(database.read(count) for _ in range(20)))

    run(database.write(insert))
    run(several())  # every connection of the pool is open
    postgresql.stop(mode)
    postgresql.start()
    run(several())
    run(database.write(increment))
    assert run(database.read(number)) == 1


def test_a_stopped_server_is_a_message_until_it_is_back(
    url: str, postgresql: PostgresqlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database.open(url)
    run(database.write(insert))
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    postgresql.stop("fast")
    try:
        for work in (database.read(count), database.write(increment)):
            with pytest.raises(StoreError) as caught:
                run(work)
            assert "Start PostgreSQL" in str(caught.value.hint)
    finally:
        postgresql.start()
    assert run(database.read(count)) == 1
    database.close()


def test_every_write_that_was_confirmed_outlives_crashes(
    database: Database, url: str, postgresql: PostgresqlServer
) -> None:
    run(database.write(insert))
    confirmed = unsure = 0

    async def write_on(until: threading.Event) -> None:
        nonlocal confirmed, unsure
        while not until.is_set():
            try:
                await database.write(increment)
                confirmed += 1
            except StoreError:
                unsure += 1

    ended = threading.Event()
    writers = threading.Thread(target=run, args=(write_on(ended),))
    writers.start()
    for _ in range(3):
        time.sleep(0.5)
        postgresql.stop("immediate")
        postgresql.start()
    ended.set()
    writers.join()
    assert confirmed
    assert confirmed <= run(database.read(number)) <= confirmed + unsure


def test_a_connection_lost_before_its_commit_is_replaced_and_the_work_done_again(database: Database) -> None:
    run(database.write(insert))
    attempts: list[int] = []

    def work(connection: Connection) -> None:
        increment(connection)
        attempts.append(1)
        if len(attempts) == 1:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    run(database.write(work))
    assert len(attempts) == 2
    assert run(database.read(number)) == 1


def test_a_connection_lost_in_its_commit_is_not_tried_again(database: Database, url: str) -> None:
    execute(
        url,
        "CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'",
    )
    execute(
        url,
        "CREATE CONSTRAINT TRIGGER leaving AFTER INSERT ON conversations DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION leave()",
    )
    with pytest.raises(StoreError, match="may or may not"):
        run(database.write(insert))
    assert run(database.read(count)) == 0


def test_tables_that_a_newer_gale_changes_meanwhile_are_read_on(database: Database, url: str) -> None:
    everything = text("SELECT * FROM conversations")
    for column in ("one", "two"):
        run(database.write(lambda connection: connection.execute(everything).all()))
        run(database.read(lambda connection: connection.execute(everything).all()))
        execute(url, f"ALTER TABLE conversations ADD COLUMN {column} INTEGER")
    run(database.write(lambda connection: connection.execute(everything).all()))
    run(database.read(lambda connection: connection.execute(everything).all()))


@pytest.fixture
def small_disk(postgresql: PostgresqlServer) -> Iterator[Path]:
    """A file system of 20 MiB that belongs to the server."""
    folder = Path(tempfile.mkdtemp(prefix="gale-disk-"))
    owner = postgresql.home.stat()
    options = f"size=20m,mode=700,uid={owner.st_uid},gid={owner.st_gid}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True)
    if os.geteuid() != 0 or mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def test_a_full_disk_loses_nothing_old_and_is_over_when_there_is_space(
    small_disk: Path, postgresql: PostgresqlServer, postgresql_template: str
) -> None:
    execute(postgresql.url(), f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    try:
        with postgresql.database(f"{postgresql_template} TABLESPACE small") as url:
            database = Database.open(url)
            run(database.write(insert))
            execute(url, "CHECKPOINT")  # a new database's pages have no place on the disk before
            big = text(
                "INSERT INTO conversations (id, created_at, updated_at, title) "
                "SELECT i::text, 0, 0, repeat('x', 1000) FROM generate_series(1, 30000) AS i"
            )
            with pytest.raises(StoreError, match="No space left") as caught:
                run(database.write(lambda connection: connection.execute(big)))
            assert "space" in str(caught.value.hint)
            assert run(database.read(count)) == 1
            subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
            run(database.write(lambda connection: connection.execute(big)))
            assert run(database.read(count)) == 30_001
            database.close()
    finally:
        execute(postgresql.url(), "DROP TABLESPACE small")
