"""A full disk: what would be written is refused and leaves nothing, batches wait, and all goes on with space again.

The disk is full for files beyond a size that the system limits, which is the same refusal in the middle of a write.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from gale.platform.errors import NoSpaceError
from gale.platform.store import Store
from gale.server.batch_journal import Journal
from tests.server.live import Live, start
from tests.server.processes import serving


@contextlib.contextmanager
def full_beyond(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    store = Store.open(f"sqlite:///{tmp_path / 'gale.db'}", files=tmp_path / "files")
    live = start(store)
    yield live
    live.stop()
    store.close()


def test_an_upload_is_refused_leaves_nothing_and_works_when_there_is_space(server: Live) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    content = b"x" * (8 * 2**20)
    kept = client.files.create(file=("small", b"small"), purpose="evals")
    upload = client.uploads.create(bytes=len(content), filename="a", mime_type="text/plain", purpose="evals")
    with full_beyond(6 * 2**20):
        for call in (
            lambda: client.files.create(file=("a", content), purpose="evals"),
            lambda: client.uploads.parts.create(upload.id, data=content),
        ):
            with pytest.raises(openai.InternalServerError) as caught:
                call()
            assert (caught.value.status_code, caught.value.code) == (507, "no_space")
            assert caught.value.response.headers["x-should-retry"] == "false"
        assert client.files.content(kept.id).read() == b"small"
        left = [path for path in server.store.file_folder.root.rglob("*") if path.is_file()]
        assert [path.name for path in left] == [kept.id]
        assert [file.id for file in client.files.list()] == [kept.id]
    part = client.uploads.parts.create(upload.id, data=content)
    assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"


def test_a_journal_stays_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with full_beyond(1000):
        journal.add("output", "a", '{"custom_id": "a", "response": null}')
        with pytest.raises(NoSpaceError):
            journal.add("output", "b", '{"custom_id": "b", "response": "' + "x" * 2000 + '"}')
        assert (journal.done, journal.counts) == ({"a"}, (1, 0))
    journal.add("output", "b", '{"custom_id": "b", "response": null}')
    journal.close()
    assert Journal(tmp_path).done == {"a", "b"}


def test_a_database_that_cannot_grow_is_read_on_and_written_again_when_there_is_space(server: Live) -> None:
    def store(text: str) -> httpx2.Response:
        items = [{"type": "message", "role": "user", "content": text}]
        return server.http.post("/v1/conversations", json={"items": items})

    kept = store("small").json()["id"]
    with full_beyond(1024 * 1024):
        answers = [store("x" * 500_000) for _ in range(8)]
        refused = answers[-1]
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["retry-after"]
        acknowledged = [answer.json()["id"] for answer in answers if answer.status_code == 200]
        for made in (kept, *acknowledged):
            assert server.http.get(f"/v1/conversations/{made}/items").status_code == 200
    assert store("x" * 500_000).status_code == 200
    for made in (kept, *acknowledged):
        assert server.http.get(f"/v1/conversations/{made}/items").status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full, serving(tmp_path, log=full) as (process, url):
        body = {"model": "scripted/one", "messages": [{"role": "user", "content": "one two"}]}
        for stream in (False, True):
            answer = httpx2.post(f"{url}/v1/chat/completions", json={**body, "stream": stream}, timeout=20)
            assert answer.status_code == 200
            assert "two" in answer.text
        bug = {**body, "messages": [{"role": "user", "content": "bug"}]}  # which logs a traceback
        for _ in range(50):
            assert httpx2.post(f"{url}/v1/chat/completions", json=bug, timeout=20).status_code == 500
        process.terminate()
        assert process.wait(30) == 0
