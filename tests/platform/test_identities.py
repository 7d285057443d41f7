"""Whom keys and sessions stand for: at once, for seconds, and not a moment longer than they should."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from gale.core.errors import StoreError
from gale.platform import tables
from gale.platform.access import LOCAL_OWNER, Actor
from gale.platform.api_keys import NewKey
from gale.platform.database import Database
from gale.platform.identities import Identities
from gale.platform.keys import _checksum, is_well_formed, new_key
from gale.platform.secret import Secret
from gale.platform.store import Store

SECRET = Secret(b"a secret of these tests, 32 bytes")


class Flaky:
    """The database, which can be counted and taken away."""

    def __init__(self, database: Database) -> None:
        self.database, self.away, self.reads = database, False, 0

    async def read(self, work: Callable[[Connection], Any]) -> Any:
        self.reads += 1
        if self.away:
            raise StoreError("The database is away.")
        return await self.database.read(work)

    async def write(self, work: Callable[[Connection], Any]) -> Any:
        if self.away:
            raise StoreError("The database is away.")
        return await self.database.write(work)


class World:
    """A store, and identities whose clock stands still unless it is moved."""

    def __init__(self, database: Database) -> None:
        self.store = Store(database, secret=SECRET)
        self.flaky = Flaky(database)
        self.now = 1000.0
        self.identities = Identities(self.flaky, SECRET, clock=lambda: self.now)  # type: ignore[arg-type]
        self.actor = LOCAL_OWNER

    async def key(self, project_id: str | None = tables.DEFAULT_PROJECT, **more: Any) -> tuple[str, str]:
        made, text = await self.store.api_keys(self.actor, project_id).create(NewKey("k", **more))
        return made.id, text

    async def who(self, key: str) -> Actor | None:
        return await self.identities.of_key(key)


@pytest.fixture
def world(sqlite_template: Path, tmp_path: Path) -> Iterator[World]:
    shutil.copy(sqlite_template, tmp_path / "gale.db")
    database = Database.open(f"sqlite:///{tmp_path / 'gale.db'}")
    yield World(database)
    database.close()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def test_a_key_stands_for_its_project_and_an_administration_key_for_its_organisation(world: World) -> None:
    async def work() -> None:
        key_id, key = await world.key(scopes=["use"], models=["m"])
        assert await world.who(key) == Actor(
            tables.DEFAULT_ORGANISATION,
            tables.DEFAULT_PROJECT,
            tables.FIRST_USER,
            key_id,
            "member",
            frozenset(["use"]),
            frozenset(["m"]),
        )
        key_id, key = await world.key(None)
        assert await world.who(key) == Actor(
            tables.DEFAULT_ORGANISATION, None, tables.FIRST_USER, key_id, "owner", None, None
        )

    run(work)


def test_a_wrong_key_costs_what_a_right_one_costs(world: World) -> None:
    async def work() -> None:
        _, key = await world.key()
        digests: list[str] = []
        digest = SECRET.digest
        world.identities._secret.digest = lambda kind, text: digests.append(text) or digest(kind, text)  # type: ignore[method-assign,func-returns-value]
        try:
            for text in (key, new_key(), new_key(admin=True)):
                world.identities.forget()
                before, world.flaky.reads = len(digests), 0
                assert (await world.who(text) is None) is (text != key)
                assert (len(digests) - before, world.flaky.reads) == (1, 1)
            before, world.flaky.reads = len(digests), 0
            assert await world.who(key[:-1] + "~") is None
            assert (len(digests) - before, world.flaky.reads) == (0, 0), "what is no key is not looked up"
        finally:
            del world.identities._secret.digest

    run(work)


def test_keys_that_begin_alike_are_not_confused(world: World) -> None:
    async def work() -> None:
        _, key = await world.key()
        assert await world.who(key) is not None
        body = key[:-10] + ("0000" if key[-10:-6] != "0000" else "1111")
        other = body + _checksum(body)
        assert is_well_formed(other)
        assert await world.who(other) is None
        assert all(len(digest) == 32 for _, digest in world.identities._known._entries), "by the whole digest"

    run(work)


def test_a_known_key_is_read_again_within_five_seconds(world: World) -> None:
    async def work() -> None:
        key_id, key = await world.key()
        for _ in range(5):
            assert await world.who(key) is not None
        assert world.flaky.reads == 1
        await world.store.api_keys(world.actor, tables.DEFAULT_PROJECT).revoke(key_id)
        world.now += 4.9
        assert await world.who(key) is None

    run(work)


@pytest.mark.parametrize("how", ["owner removed", "account deleted", "project archived", "user disabled", "demoted"])
def test_a_key_ends_with_what_it_belongs_to(world: World, how: str) -> None:
    async def work() -> None:
        people = world.store.people(world.actor)
        project = await world.store.projects(world.actor).create("p")
        person = await people.create("Ann", "ann@example.com", "owner" if how == "demoted" else "member")
        await people.add(project.id, "member", user_id=person.id)
        accounts = world.store.service_accounts(world.actor, project.id)
        account = await accounts.create("robot")
        owner = account.id if how == "account deleted" else person.id
        scope = None if how == "demoted" else project.id
        _, key = await world.store.api_keys(world.actor, scope).create(NewKey("k"), owner)
        before = await world.who(key)
        assert before is not None
        assert before.role == ("owner" if how == "demoted" else "member")
        match how:
            case "owner removed":
                await people.remove(person.id, project.id)
            case "account deleted":
                await accounts.delete(account.id)
            case "project archived":
                await world.store.projects(world.actor).archive(project.id)
            case "user disabled":
                disable = tables.users.update().where(tables.users.c.id == person.id).values(disabled_at=1)
                await world.flaky.write(lambda connection: connection.execute(disable) and None)
            case "demoted":
                await people.change(person.id, "reader")
        world.now += 4.9
        after = await world.who(key)
        assert after is None if how != "demoted" else after is not None and after.role == "reader"

    run(work)


def test_a_key_ends_on_its_day_even_while_it_is_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        _, key = await world.key(expires_in_s=60)
        assert await world.who(key) is not None
        from gale.platform import identities

        now = identities.now_us()
        monkeypatch.setattr(identities, "now_us", lambda: now + 61_000_000)
        assert await world.who(key) is None

    run(work)


def test_without_the_database_known_keys_work_for_a_minute_and_nobody_else_gets_an_answer(world: World) -> None:
    async def work() -> None:
        _, key = await world.key()
        _, unseen = await world.key()
        assert await world.who(key) is not None
        world.flaky.away = True
        world.now += 59
        assert await world.who(key) is not None
        with pytest.raises(StoreError):
            await world.who(unseen)
        with pytest.raises(StoreError):
            await world.who(new_key())
        world.now += 2
        with pytest.raises(StoreError):
            await world.who(key)
        world.flaky.away = False
        assert await world.who(key) is not None

    run(work)


def test_many_requests_at_once_read_once_and_one_that_leaves_ends_no_other(world: World) -> None:
    async def work() -> None:
        _, key = await world.key()
        asking = [asyncio.create_task(world.who(key)) for _ in range(50)]
        await asyncio.sleep(0)
        asking[0].cancel()
        answers = await asyncio.gather(*asking[1:])
        assert all(answer is not None for answer in answers)
        assert world.flaky.reads == 1

    run(work)


def test_a_flood_of_wrong_keys_costs_few_reads_and_drives_out_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gale.platform.recent.MOST", 300)

    async def work() -> None:
        identities = Identities(world.flaky, SECRET, clock=lambda: world.now)  # type: ignore[arg-type]
        known = [(await world.key())[1] for _ in range(3)]
        assert all([await identities.of_key(key) for key in known])
        world.flaky.reads = 0
        wrong = [new_key() for _ in range(1200)]
        answers = await asyncio.gather(*(identities.of_key(key) for key in [*wrong, *known]))
        assert [answer is not None for answer in answers] == [False] * len(wrong) + [True] * len(known)
        assert world.flaky.reads <= 4, "those that come together are looked up together"
        for _ in range(50):
            assert await identities.of_key(wrong[-1]) is None
        assert all([await identities.of_key(key) for key in known])
        assert world.flaky.reads <= 4, "and one that comes again is not looked up again"
        assert len(identities._known._absent) <= 300, "but not all are remembered"
        world.now += 4.9
        assert await identities.of_key(wrong[-1]) is None
        assert world.flaky.reads <= 5

    run(work)


def test_a_key_that_was_refused_works_once_it_is_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    text = new_key()
    monkeypatch.setattr("gale.platform.api_keys.new_key", lambda **_: text)

    async def work() -> None:
        other = Identities(world.flaky, SECRET, clock=lambda: world.now)  # type: ignore[arg-type]
        assert await world.who(text) is None
        assert await other.of_key(text) is None
        await world.key()
        world.identities.forget()  # as the routes do
        assert await world.who(text) is not None, "in the process that made it at once"
        assert await other.of_key(text) is None
        world.now += 4.9
        assert await other.of_key(text) is not None, "and in others within seconds"

    run(work)


def test_a_look_up_that_fails_is_not_taken_for_an_unknown_key(world: World) -> None:
    async def work() -> None:
        keys = [(await world.key())[1] for _ in range(3)]
        world.flaky.away = True
        for failure in await asyncio.gather(*map(world.who, keys), return_exceptions=True):
            assert isinstance(failure, StoreError)
        world.flaky.away = False
        assert all(await asyncio.gather(*map(world.who, keys)))

    run(work)


def test_last_use_is_written_beside_requests_and_once_a_minute(world: World) -> None:
    async def work() -> None:
        key_id, key = await world.key()
        keys = world.store.api_keys(world.actor, tables.DEFAULT_PROJECT)
        await world.who(key)
        assert (await keys.get(key_id)).last_used_at is None
        await world.identities.write_last_use()
        first = (await keys.get(key_id)).last_used_at
        assert first is not None
        await asyncio.sleep(0.001)
        await world.who(key)
        world.now += 59
        await world.identities.write_last_use()
        assert (await keys.get(key_id)).last_used_at == first
        world.flaky.away = True
        world.now += 2
        with pytest.raises(StoreError):
            await world.identities.write_last_use()
        world.flaky.away = False
        await world.identities.write_last_use()
        assert ((await keys.get(key_id)).last_used_at or 0) > first

    run(work)


@pytest.mark.parametrize("beginning", ["key", "revoked key", "sign-in", "person", "organisation"])
def test_local_mode_ends_with_the_first_account_and_never_begins_again(world: World, beginning: str) -> None:
    async def work() -> None:
        assert await world.identities.accounts_exist() is False
        match beginning:
            case "key":
                await world.key()
            case "revoked key":
                key_id, _ = await world.key()
                await world.store.api_keys(world.actor, tables.DEFAULT_PROJECT).revoke(key_id)
            case "sign-in":
                link = await world.store.sessions.owner_link()
                assert link is not None
                assert await world.store.sessions.sign_in(link.token, None)
            case "person":
                ann = await world.store.people(world.actor).create("Ann", "a@b.c", "member")
                await world.store.people(world.actor).remove(ann.id)
            case "organisation":
                made, _ = await world.store.organisations.create("Acme")
                shell = Actor(made.id, None, None, None, "owner")
                await world.store.people(shell).create("Bo", "b@b.c", "owner")
        world.now += 4.9
        assert await world.identities.accounts_exist() is True
        world.flaky.away = True
        world.now += 1000
        assert await world.identities.accounts_exist() is True

    run(work)


def test_whether_there_are_accounts_is_not_guessed_without_the_database(world: World) -> None:
    async def work() -> None:
        world.flaky.away = True
        with pytest.raises(StoreError):
            await world.identities.accounts_exist()

    run(work)
