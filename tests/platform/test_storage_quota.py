"""A project's share of the disk holds whatever is sent at once, again, or never finished; on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gale.platform import storage_quota, uploads
from gale.platform.access import LOCAL_OWNER, Actor
from gale.platform.errors import ConflictError, StorageQuotaError
from gale.platform.files import File, FileLimits
from gale.platform.store import Store
from gale.platform.uploads import Part, Upload, UploadError

QUOTA = 1000


@pytest.fixture
def stores(database_url: str, tmp_path: Path) -> Iterator[list[Store]]:
    """One database and one folder as two servers have them open."""
    limits = FileLimits(project_bytes=QUOTA)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                contextlib.closing(Store.open(database_url, files=tmp_path / "files", file_limits=limits))
            )
            for _ in range(2)
        ]


@pytest.fixture
def store(stores: list[Store]) -> Store:
    return stores[0]


async def begin(store: Store, size: int) -> Upload:
    return await store.uploads(LOCAL_OWNER).create(
        filename="a", purpose="evals", size=size, mime_type="text/plain", file_lasts_s=None
    )


async def send(store: Store, upload: Upload, size: int) -> Part:
    mine = store.uploads(LOCAL_OWNER)
    with mine.incoming_part() as incoming:
        incoming.write(b"x" * size)
        return await mine.add_part(upload.id, incoming)


async def keep(store: Store, size: int) -> File:
    mine = store.files(LOCAL_OWNER)
    with mine.folder.incoming(size) as incoming:
        incoming.write(b"x" * size)
        return await mine.keep(incoming, filename="a", purpose="evals")


async def refused(work: Awaitable[Any]) -> bool:
    try:
        await work
    except StorageQuotaError:
        return True
    return False


def on_disk(store: Store) -> int:
    return sum(path.stat().st_size for path in store.file_folder.root.rglob("*") if path.is_file())


def test_what_is_begun_at_once_does_not_pass_together(stores: list[Store]) -> None:
    async def work() -> None:
        tried = [begin(stores[number % 2], 100) for number in range(8)] + [keep(stores[0], 300), keep(stores[1], 300)]
        done = await asyncio.gather(*tried, return_exceptions=True)
        failures = [each for each in done if isinstance(each, BaseException)]
        assert all(isinstance(each, StorageQuotaError) for each in failures)
        taken = sum(200 if isinstance(each, Upload) else 300 for each in done if isinstance(each, Upload | File))
        assert QUOTA - 200 < taken <= QUOTA

    asyncio.run(work())


def test_an_upload_counts_for_its_parts_and_for_its_file_until_that_counts_itself(store: Store) -> None:
    async def work() -> None:
        assert await refused(begin(store, 501)), "which could never be completed"
        upload = await begin(store, 400)
        part = await send(store, upload, 400)
        assert await refused(keep(store, 201))
        with pytest.raises(UploadError):
            await store.uploads(LOCAL_OWNER).complete(upload.id, [part.id], "0" * 32)
        assert await refused(keep(store, 201)), "a completion that failed gives nothing back"
        await store.uploads(LOCAL_OWNER).complete(upload.id, [part.id], None)
        assert await refused(keep(store, 601))
        await keep(store, 600)
        assert on_disk(store) == QUOTA

    asyncio.run(work())


def test_while_it_is_completed_both_count(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    joining, go_on, join = threading.Event(), threading.Event(), uploads._join

    def slowly(*arguments: Any) -> Any:
        joined = join(*arguments)
        joining.set()
        assert go_on.wait(60)
        return joined

    monkeypatch.setattr(uploads, "_join", slowly)

    async def work() -> None:
        upload = await begin(store, 400)
        part = await send(store, upload, 400)
        completing = asyncio.create_task(store.uploads(LOCAL_OWNER).complete(upload.id, [part.id], None))
        assert await asyncio.to_thread(joining.wait, 60)
        try:
            assert on_disk(store) == 800
            assert await refused(keep(store, 201))
            await keep(store, 200)
            assert await refused(begin(store, 1))
        finally:
            go_on.set()
        await completing
        assert on_disk(store) == 600

    asyncio.run(work())


def test_parts_that_are_sent_again_count_too(store: Store) -> None:
    async def work() -> None:
        upload = await begin(store, 300)
        for _ in range(2):
            await send(store, upload, 200)
        assert await refused(keep(store, 301))
        await keep(store, 300)
        assert await refused(send(store, upload, 1))
        assert on_disk(store) == 700, "what was refused is not there"

    asyncio.run(work())


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_what_ends_without_a_file_is_free_again_and_gone(
    stores: list[Store], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def work() -> None:
        upload = await begin(stores[0], 400)
        await send(stores[0], upload, 400)
        assert await refused(keep(stores[1], 900))
        if how == "cancelled":
            await stores[0].uploads(LOCAL_OWNER).cancel(upload.id)
        else:
            later = storage_quota.now_us() + (uploads.LASTS_S + 1) * 1_000_000
            for module in (storage_quota, uploads):
                monkeypatch.setattr(module, "now_us", lambda: later)
        await keep(stores[1], 900)
        assert on_disk(stores[0]) == 900, "and not only counted no more"
        with pytest.raises(ConflictError, match=how):
            await send(stores[0], upload, 1)
        assert on_disk(stores[0]) == 900

    asyncio.run(work())


def test_expired_uploads_are_swept_away_but_for_one_that_is_being_completed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        left, completing = [await begin(store, 100) for _ in range(2)]
        for upload in (left, completing):
            await send(store, upload, 100)
        await store.database.write(lambda connection: uploads._move(connection, completing.id, "completing"))
        later = storage_quota.now_us() + (uploads.LASTS_S + 1) * 1_000_000
        monkeypatch.setattr(storage_quota, "now_us", lambda: later)
        await store.sweep()
        assert on_disk(store) == 100
        assert await refused(keep(store, 801))
        await store.sweep(abandoned_s=0)
        assert on_disk(store) == 0
        await keep(store, QUOTA)

    asyncio.run(work())


def test_one_whose_completion_begins_while_others_are_released_keeps_its_parts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        upload = await begin(store, 100)
        await send(store, upload, 100)
        later = storage_quota.now_us() + (uploads.LASTS_S + 1) * 1_000_000
        monkeypatch.setattr(storage_quota, "now_us", lambda: later)
        read = store.database.read

        async def read_then_complete(asked: Any) -> Any:
            found = await read(asked)
            await store.database.write(lambda connection: uploads._move(connection, upload.id, "completing"))
            return found

        monkeypatch.setattr(store.database, "read", read_then_complete)
        assert await storage_quota.release_expired(store.database, store.file_folder) == 0
        assert on_disk(store) == 100

    asyncio.run(work())


def test_another_s_uploads_take_nothing_of_mine(store: Store) -> None:
    async def work() -> None:
        project = await store.projects(LOCAL_OWNER).create("other")
        other = Actor(LOCAL_OWNER.organisation_id, project.id, LOCAL_OWNER.user_id, None, "owner")
        await store.uploads(other).create(
            filename="a", purpose="evals", size=500, mime_type="text/plain", file_lasts_s=None
        )
        await keep(store, QUOTA)

    asyncio.run(work())
