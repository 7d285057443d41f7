"""What is kept for a while only goes when that is over, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from gale.platform import pruning, tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.clock import now_us
from gale.platform.ids import new_id
from gale.platform.pruning import DAY_US
from gale.platform.store import Store
from gale.platform.usage import UsageEvent, write_events
from gale.platform.usage_report import Question
from tests.platform.rows import run


@pytest.fixture
def store(database_url: str, tmp_path: Path, gale_home: Path) -> Iterator[Store]:
    opened = Store.open(database_url, files=tmp_path / "files")
    yield opened
    opened.close()


def event(days_ago: int, organisation_id: str) -> UsageEvent:
    at = now_us() - days_ago * DAY_US
    whose = (organisation_id, "proj_default", None, None)
    return UsageEvent(new_id("usage"), at, *whose, "m", "completions", 0, 1, 10, 0, 5, 1000, None)


def ids(store: Store, table: Any) -> set[str]:
    return set(run(store.database.read(lambda connection: connection.scalars(select(table.c.id)).all())))


def test_old_usage_goes_few_events_at_once_and_its_sums_stay(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "AT_ONCE", 3)
    other, _ = run(store.organisations.create("Other"))
    old = [event(401 + number, whose) for number in range(5) for whose in ("org_default", other.id)]
    young = [event(399, "org_default"), event(0, other.id)]
    run(store.database.write(lambda connection: write_events(connection, [*old, *young])))
    wanted = Question(now_us() - 500 * DAY_US, now_us() + DAY_US, "1d")
    report = store.usage_report(LOCAL_OWNER)
    before, writes = run(report.answer(wanted)), []
    write = store.database.write

    async def watched(work: Any, **more: Any) -> Any:
        writes.append(work)
        return await write(work, **more)

    monkeypatch.setattr(store.database, "write", watched)
    run(pruning.prune(store.database, 400))
    assert ids(store, tables.usage_events) == {each.id for each in young}
    assert len(writes) == 4  # five events are two pieces, of each organisation
    assert len(before) == 6 and run(report.answer(wanted)) == before
    run(pruning.prune(store.database, 400))
    assert len(writes) == 4  # where nothing is over, nothing is written


def test_uploads_that_are_long_over_go_with_their_parts(store: Store) -> None:
    async def begin() -> str:
        uploads = store.uploads(LOCAL_OWNER)
        asked = {"filename": "a", "purpose": "batch", "size": 1, "mime_type": "text/plain", "file_lasts_s": None}
        upload = await uploads.create(**asked)
        with uploads.incoming_part() as incoming:
            incoming.write(b"x")
            await uploads.add_part(upload.id, incoming)
        return upload.id

    over, fresh = run(begin()), run(begin())

    def age(connection: Connection) -> None:
        table = tables.uploads
        values = {"expires_at": now_us() - 2 * DAY_US}
        connection.execute(update(table).where(table.c.id == over).values(values))

    run(store.database.write(age))
    run(store.sweep())
    assert ids(store, tables.uploads) == {fresh}
    assert len(ids(store, tables.upload_parts)) == 1


def test_the_setting_says_for_how_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from gale.core.settings import settings

    monkeypatch.setenv("GALE_USAGE_DAYS", "7")
    settings.cache_clear()
    events = [event(8, "org_default"), event(6, "org_default")]
    run(store.database.write(lambda connection: write_events(connection, events)))
    run(store.sweep())
    assert ids(store, tables.usage_events) == {events[1].id}
