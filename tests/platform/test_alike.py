"""Both kinds of database give the same answers, whatever language PostgreSQL orders names by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select

from gale.core.errors import StoreError
from gale.platform import tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.limits import change_limits, limits_of
from gale.platform.listing import Listing, page_of
from gale.platform.prices import Price, set_price
from gale.platform.responses import ItemConversations
from gale.platform.store import Store
from gale.platform.usage import UsageEvent, write_events
from gale.platform.usage_report import Question
from tests.databases import PostgresqlServer
from tests.platform.rows import run

# As an English dictionary has them; by their characters: B, _c, a, é.
NAMES = ["_c", "a", "B", "é"]
ENGLISH = "template0 ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'"


@pytest.fixture(params=["sqlite", "postgresql", "postgresql in English"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'gale.db'}"
        if request.param != "sqlite":
            server: PostgresqlServer = request.getfixturevalue("postgresql")
            english = request.param == "postgresql in English"
            url = stack.enter_context(server.database(ENGLISH if english else "template1"))
        yield stack.enter_context(contextlib.closing(Store.open(url, files=tmp_path / "files")))


def test_what_was_made_in_one_moment_is_listed_once_over_pages_of_any_length(store: Store) -> None:
    table = tables.projects
    rows = [
        {"id": f"{name}{n}", "organisation_id": "org_default", "name": "", "created_at": 1}
        for name in NAMES
        for n in "aB1"
    ]

    def page(connection: Connection, after: str | None, order: Any) -> Listing[Any]:
        return page_of(
            connection, select(table).where(table.c.created_at == 1), table, limit=5, after=after, order=order
        )

    async def work() -> None:
        await store.database.write(lambda connection: connection.execute(insert(table), rows))
        for order in ("asc", "desc"):
            found: list[str] = []
            more = True
            while more:
                after = found[-1] if found else None
                listed = await store.database.read(lambda c, after=after, order=order: page(c, after, order))  # type: ignore[misc]
                found += [row.id for row in listed.items]
                more = listed.has_more
            assert sorted(found) == sorted(row["id"] for row in rows)

    run(work())


def test_names_are_in_the_order_of_their_characters(store: Store) -> None:
    scope = ("project", "proj_default")

    def work(connection: Connection) -> list[str]:
        for name in NAMES:
            change_limits(connection, scope, name, {"concurrency": 1})  # type: ignore[arg-type]
        event = UsageEvent("", 0, "org_default", "p", None, None, "", "completions", 0, 1, 1, 0, 1, 0, None)
        write_events(connection, [UsageEvent(**{**_fields(event), "id": name, "model": name}) for name in NAMES])
        return [limit.model for limit in limits_of(connection, scope)]  # type: ignore[arg-type]

    assert run(store.database.write(work)) == sorted(NAMES)
    for width in ("1m", "1h"):
        used = run(store.usage_report(LOCAL_OWNER).answer(Question(0, 1, width, ("api_key_id", "model"))))  # type: ignore[arg-type]
        assert [each.axes["model"] for each in used] == sorted(NAMES)
        assert {type(value) for each in used for value in (each.requests, each.cost_micro, each.bucket)} == {int}


def test_addresses_are_the_same_in_any_case_and_names_are_not(store: Store) -> None:
    async def work() -> None:
        people = store.people(LOCAL_OWNER)
        await people.create("Ann", "ÄNN@Example.com", "member")
        assert [each.name for each in (await people.page(emails=["änn@EXAMPLE.com"])).items] == ["Ann"]
        await store.database.write(lambda connection: set_price(connection, "A", Price(1, 1, 1)))
        await store.database.write(lambda connection: set_price(connection, "a", Price(2, 2, 2)))
        assert len(await store.quotas(LOCAL_OWNER, operator=True).prices()) == 2

    run(work())


def test_json_holds_whatever_json_can_and_counts_alike(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gale.platform.responses.MOST_CHARACTERS", 300)
    item = {
        "id": "msg_1",
        "text": "NUL \0, half \ud800, 你好, 😀",
        "big": 2**70,
        "small": 1e-300,
        "on": True,
        "no": None,
    }

    async def work() -> None:
        conversations = ItemConversations(store.database, LOCAL_OWNER)
        made = await conversations.create({}, [item])
        assert await conversations.items(made.id) == [item]
        await conversations.add(made.id, [{**item, "id": "msg_2", "text": ""}])
        with pytest.raises(Exception, match="too long"):
            await conversations.add(made.id, [{**item, "id": "msg_3", "text": ""}])

    run(work())


def test_a_name_that_is_too_long_for_an_index_is_a_message(store: Store, request: pytest.FixtureRequest) -> None:
    """PostgreSQL's indexes hold 2,700 bytes (and compress them); nobody can give a name that long over HTTP."""
    name = "".join(chr(0x4E00 + number * 7919 % 20_000) for number in range(5_000))
    if "sqlite" in request.node.name:
        run(store.database.write(lambda connection: set_price(connection, name, Price())))
        return
    with pytest.raises(StoreError, match="index row") as caught:
        run(store.database.write(lambda connection: set_price(connection, name, Price())))
    assert "shorter" in str(caught.value.hint)


def _fields(event: UsageEvent) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__slots__}
