"""Organisations, people, keys and the audit log, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from gale.core.errors import StoreError
from gale.platform import tables
from gale.platform.access import LOCAL_OWNER, Actor, NotAllowedError
from gale.platform.api_keys import NewKey
from gale.platform.audit import AuditFilter
from gale.platform.database import Database
from gale.platform.errors import ConflictError, CursorError, NotFoundError
from gale.platform.file_folder import FileFolder
from gale.platform.secret import Secret
from gale.platform.store import Store
from tests.databases import execute

DEFAULT = tables.DEFAULT_PROJECT


@pytest.fixture
def store(database_url: str, tmp_path: Path) -> Iterator[Store]:
    opened = Store(Database.open(database_url), secret=Secret(b"s" * 32), folder=FileFolder(tmp_path / "files"))
    yield opened
    opened.close()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(work())  # type: ignore[arg-type]


def test_a_new_gale_has_one_organisation_project_and_owner(store: Store) -> None:
    async def work() -> None:
        assert [each.id for each in await store.organisations.all()] == [tables.DEFAULT_ORGANISATION]
        assert [each.id for each in (await store.projects(LOCAL_OWNER).page()).items] == [DEFAULT]
        (owner,) = (await store.people(LOCAL_OWNER).page()).items
        assert (owner.id, owner.role, owner.claimed_at) == (tables.FIRST_USER, "owner", None)
        assert (await store.audit_log(LOCAL_OWNER).page(AuditFilter())).items == []

    run(work)


def test_keys_are_found_by_their_digest_with_what_their_owner_may(store: Store) -> None:
    async def work() -> None:
        keys = store.api_keys(LOCAL_OWNER, DEFAULT)
        made, text = await keys.create(NewKey("k", ["read", "use"], ["m"], 3600))
        assert text.startswith(made.prefix)
        assert text.endswith(made.last4)
        assert (made.scopes, made.models) == (["read", "use"], ["m"])
        actor = await store.identities().of_key(text)
        assert actor is not None
        assert (actor.key_id, actor.scopes, actor.models) == (made.id, {"read", "use"}, {"m"})
        assert (await keys.get(made.id)).owner_id == tables.FIRST_USER
        assert (await keys.change(made.id, scopes=[])).scopes is None
        await keys.revoke(made.id)
        assert await store.identities().of_key(text) is None
        with pytest.raises(NotFoundError):
            await keys.get(made.id)
        assert (await keys.page()).items == []

    run(work)


def test_an_organisation_keeps_an_owner(store: Store) -> None:
    async def work() -> None:
        people = store.people(LOCAL_OWNER)
        for change in (people.change(tables.FIRST_USER, "member"), people.remove(tables.FIRST_USER)):
            with pytest.raises(ConflictError):
                await change
        ann = await people.create("Ann", "Ann@Example.com", "owner")
        assert ann.email == "ann@example.com"
        await people.change(tables.FIRST_USER, "member")
        with pytest.raises(ConflictError):
            await people.remove(ann.id)
        with pytest.raises(ConflictError):
            await people.create("Another Ann", " ann@example.COM ", "member")

    run(work)


def test_the_archived_project_takes_nothing_new_and_the_default_one_stays(store: Store) -> None:
    async def work() -> None:
        projects = store.projects(LOCAL_OWNER)
        project = await projects.create("  two\n words ")
        assert project.name == "two words"
        await projects.archive(project.id)
        with pytest.raises(ConflictError):
            await store.api_keys(LOCAL_OWNER, project.id).create(NewKey("k"))
        with pytest.raises(ConflictError):
            await store.service_accounts(LOCAL_OWNER, project.id).create("s")
        with pytest.raises(ConflictError):
            await projects.archive(DEFAULT)
        assert len((await projects.page()).items) == 1
        assert len((await projects.page(archived=True)).items) == 2

    run(work)


def test_pages_go_on_after_an_id(store: Store) -> None:
    async def work() -> None:
        projects = store.projects(LOCAL_OWNER)
        made = [(await projects.create(f"p{number}")).id for number in range(5)]
        first = await projects.page(limit=2)
        second = await projects.page(limit=10, after=first.items[-1].id)
        assert [each.id for each in first.items + second.items] == [*made[::-1], DEFAULT]
        assert (first.has_more, second.has_more) == (True, False)
        with pytest.raises(CursorError):
            await projects.page(after="proj_other")

    run(work)


def test_only_owners_administer(store: Store) -> None:
    member = Actor(tables.DEFAULT_ORGANISATION, DEFAULT, tables.FIRST_USER, None, "member")
    for ask in (
        lambda: store.projects(member),
        lambda: store.people(member),
        lambda: store.api_keys(member, DEFAULT),
        lambda: store.service_accounts(member, DEFAULT),
        lambda: store.audit_log(member),
    ):
        with pytest.raises(NotAllowedError):
            ask()

    async def work() -> None:
        with pytest.raises(NotAllowedError):
            await store.sessions.link_for(member, tables.FIRST_USER)

    run(work)


def test_an_event_is_written_with_what_it_records_or_not_at_all(store: Store) -> None:
    async def work() -> None:
        people = store.people(LOCAL_OWNER)
        await people.create("Ann", "ann@example.com", "member")
        with pytest.raises(ConflictError):
            await people.create("Ann", "ann@example.com", "member")
        events = (await store.audit_log(LOCAL_OWNER).page(AuditFilter())).items
        assert [event.type for event in events] == ["user.added"]

    run(work)


def test_the_database_refuses_to_change_or_delete_events(store: Store, database_url: str) -> None:
    run(lambda: store.projects(LOCAL_OWNER).create("p"))
    for statement in ("UPDATE audit_events SET type = 'x'", "DELETE FROM audit_events"):
        with pytest.raises((StoreError, DBAPIError), match="written once"):
            run(lambda statement=statement: store.database.write(lambda c: c.exec_driver_sql(statement) and None))
    assert execute(database_url, "SELECT type FROM audit_events") == [("project.created",)]


def test_events_are_filtered_and_paged(store: Store) -> None:
    async def work() -> None:
        ann = await store.people(LOCAL_OWNER).create("Ann", "ann@example.com", "owner")
        project = await store.projects(LOCAL_OWNER).create("p")
        by_ann = Actor(tables.DEFAULT_ORGANISATION, None, ann.id, None, "owner")
        key, _ = await store.api_keys(by_ann, project.id).create(NewKey("k", ["use"]))
        by_key = Actor(tables.DEFAULT_ORGANISATION, None, ann.id, key.id, "owner")
        await store.projects(by_key).archive(project.id)

        async def types(**conditions: Any) -> list[str]:
            found = await store.audit_log(LOCAL_OWNER).page(AuditFilter(**conditions), limit=100)
            return [event.type for event in found.items]

        assert await types() == ["project.archived", "api_key.created", "project.created", "user.added"]
        assert await types(types=["user.added", "api_key.created"]) == ["api_key.created", "user.added"]
        assert await types(project_ids=[project.id, "proj_none"]) == await types(resource_ids=[project.id, key.id])
        assert await types(actor_ids=[ann.id]) == ["project.archived", "api_key.created"]
        assert await types(actor_ids=[key.id]) == ["project.archived"]
        assert await types(actor_emails=["ANN@example.com"]) == ["project.archived", "api_key.created"]
        events = (await store.audit_log(LOCAL_OWNER).page(AuditFilter())).items
        assert await types(after_us=events[1].created_at) == ["project.archived", "api_key.created"]
        assert await types(before_us=events[1].created_at) == ["project.created", "user.added"]
        assert events[1].details == {"id": key.id, "data": {"scopes": ["use"]}}
        assert events[1].actor == {"type": "session", "session": {"user": {"id": ann.id, "email": "ann@example.com"}}}
        assert events[0].actor["api_key"]["id"] == key.id
        page = await store.audit_log(LOCAL_OWNER).page(AuditFilter(), limit=1, after=events[0].id)
        assert ([each.id for each in page.items], page.has_more) == ([events[1].id], True)

    run(work)


def test_a_link_works_once_and_ends_with_its_day(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        old, link = await store.sessions.owner_link(), await store.sessions.owner_link()
        assert old is not None
        assert link is not None
        assert len(link.token) >= 43
        session = await store.sessions.sign_in(link.token, "192.0.2.1")
        assert session is not None
        for token in (link.token, old.token, session, "", "x" * 1_000_000, "\0", "'; --"):
            assert await store.sessions.sign_in(token, None) is None
        assert await store.sessions.owner_link() is None, "it has its owner"
        actor = await store.identities().of_session(session)
        assert actor == LOCAL_OWNER
        assert actor is not LOCAL_OWNER
        assert await store.identities().of_session(link.token) is None
        event = (await store.audit_log(LOCAL_OWNER).page(AuditFilter())).items[0]
        assert (event.type, event.actor["session"]["ip_address"]) == ("login.succeeded", "192.0.2.1")
        await store.sessions.sign_out(LOCAL_OWNER, session)
        assert await store.identities().of_session(session) is None

        from gale.platform import sessions

        late = await store.sessions.link_for(LOCAL_OWNER, tables.FIRST_USER)
        now = sessions.now_us()
        monkeypatch.setattr(sessions, "now_us", lambda: now + 25 * 3600 * 1_000_000)
        assert await store.sessions.sign_in(late.token, None) is None

    run(work)


def test_people_sign_in_where_they_belong(store: Store) -> None:
    async def work() -> None:
        people, projects = store.people(LOCAL_OWNER), store.projects(LOCAL_OWNER)
        project = await projects.create("p")
        ann = await people.create("Ann", "ann@example.com", "member")
        link = await store.sessions.link_for(LOCAL_OWNER, ann.id)
        session = await store.sessions.sign_in(link.token, None)
        assert session is not None

        async def who() -> tuple[str | None, str] | None:
            actor = await store.identities().of_session(session)
            return None if actor is None else (actor.project_id, actor.role)

        assert await who() == (None, "member")
        await people.add(project.id, "reader", user_id=ann.id)
        assert await who() == (project.id, "reader")
        await people.change(ann.id, "owner", project.id)
        assert await who() == (project.id, "member"), "an owner of a project does not administer the organisation"
        await people.change(ann.id, "owner")
        assert await who() == (DEFAULT, "owner")
        await people.remove(ann.id)
        assert await who() is None

    run(work)


def test_nothing_that_is_kept_can_be_used(store: Store, database_url: str) -> None:
    """The canary: neither a key nor a link nor a session stands in any table."""

    async def work() -> list[str]:
        _, key = await store.api_keys(LOCAL_OWNER, DEFAULT).create(NewKey("k"))
        first, second = await store.sessions.owner_link(), await store.sessions.owner_link()
        assert first is not None
        assert second is not None
        session = await store.sessions.sign_in(first.token, None)
        assert session is not None
        return [key, second.token, session]

    secrets = run(work)
    dump = ""
    for table in tables.metadata.sorted_tables:
        dump += "\n".join(map(str, execute(database_url, f"SELECT * FROM {table.name}")))
    assert "api_key.created" in dump
    for secret in secrets:
        assert secret not in dump
        assert secret[12:36] not in dump


def test_names_of_people_cannot_break_a_statement(store: Store) -> None:
    async def work() -> None:
        name = "Robert'); DROP TABLE users;-- \0\ud800"
        ann = await store.people(LOCAL_OWNER).create(name, "r@example.com", "member")
        assert ann.name == "Robert'); DROP TABLE users;-- ��"
        for id in ("' OR '1'='1", "\0", "\ud800", "%", ""):
            with pytest.raises(NotFoundError):
                await store.people(LOCAL_OWNER).get(id)
            with pytest.raises(NotFoundError):
                await store.projects(LOCAL_OWNER).get(id)

    run(work)
