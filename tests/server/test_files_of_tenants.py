"""Files, uploads and batches of one project are nothing that another's key can see, touch or name; and what a key may
not do itself, it cannot have a batch do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import insert, select

from gale.platform import tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.api_keys import NewKey
from gale.platform.store import Store
from tests.server.live import Live, eventually, start
from tests.server.test_batches import CHAT, answers, begin, ended, jsonl, line, said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("tenants")
    store = Store.open(f"sqlite:///{folder / 'gale.db'}", files=folder / "files")
    asyncio.run(
        store.database.write(
            lambda connection: connection.execute(
                insert(tables.projects).values(
                    id="proj_two", organisation_id=tables.DEFAULT_ORGANISATION, name="two", created_at=1
                )
            )
        )
    )
    live = start(store)
    yield live
    live.stop()
    store.close()


def client_of(server: Live, project: str = tables.DEFAULT_PROJECT, **more: Any) -> OpenAI:
    _, key = asyncio.run(server.store.api_keys(LOCAL_OWNER, project).create(NewKey("k", **more)))
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_another_project_s_files_uploads_and_batches_do_not_exist(server: Live) -> None:
    mine, theirs = client_of(server), client_of(server, "proj_two")
    file = mine.files.create(file=("a", jsonl(line("a", "endless"))), purpose="batch")
    upload = mine.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="evals")
    batch = mine.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    for call in (
        lambda: theirs.files.retrieve(file.id),
        lambda: theirs.files.content(file.id),
        lambda: theirs.files.delete(file.id),
        lambda: theirs.uploads.parts.create(upload.id, data=b"abc"),
        lambda: theirs.uploads.complete(upload.id, part_ids=["part_x"]),
        lambda: theirs.uploads.cancel(upload.id),
        lambda: theirs.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(theirs.files.list()) == []
    assert list(theirs.batches.list()) == []
    for listing in (lambda: theirs.files.list(after=file.id), lambda: theirs.batches.list(after=batch.id)):
        with pytest.raises(openai.BadRequestError):
            listing()
    mine.batches.cancel(batch.id)
    assert ended(mine, batch.id).status == "cancelled"


def test_keys_that_may_only_read_cannot_upload_or_begin(server: Live) -> None:
    reader = client_of(server, scopes=["read"])
    file = client_of(server).files.create(file=("a", jsonl(line("a"))), purpose="batch")
    assert reader.files.retrieve(file.id).id == file.id
    for call in (
        lambda: reader.files.create(file=("a", b"x"), purpose="batch"),
        lambda: reader.files.delete(file.id),
        lambda: reader.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="evals"),
        lambda: reader.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.PermissionDeniedError):
            call()


def test_a_batch_may_ask_only_the_models_of_its_key(server: Live) -> None:
    narrow = client_of(server, models=["another"])
    done = ended(narrow, begin(narrow, jsonl(line("a"))).id)
    assert (done.request_counts.completed, done.request_counts.failed) == (0, 1)
    failed = answers(narrow, done.error_file_id)["a"]["response"]
    assert (failed["status_code"], failed["body"]["error"]["code"]) == (404, "model_not_found")


def test_a_batch_s_tokens_are_its_key_s(server: Live) -> None:
    client = client_of(server, "proj_two")
    done = ended(client, begin(client, jsonl(line("a", "one two"), line("b", "three"))).id)
    assert {name: said(row) for name, row in answers(client, done.output_file_id).items()} == {
        "a": "one two",
        "b": "three",
    }
    events = tables.usage_events
    query = select(events.c.output_tokens, events.c.batch).where(events.c.project_id == "proj_two")

    def counted() -> list[tuple[int, int]]:
        rows = asyncio.run(server.store.database.read(lambda connection: connection.execute(query).all()))
        return sorted(tuple(row) for row in rows)

    eventually(lambda: counted() == [(1, 1), (2, 1)])


def test_a_revoked_key_s_batch_is_cancelled(server: Live) -> None:
    keys = server.store.api_keys(LOCAL_OWNER, tables.DEFAULT_PROJECT)
    made, text = asyncio.run(keys.create(NewKey("k")))
    client = OpenAI(base_url=f"{server.url}/v1", api_key=text, max_retries=0)
    batch = begin(client, jsonl(line("a", "endless")))
    asyncio.run(keys.revoke(made.id))
    done = ended(client_of(server), batch.id)
    assert (done.status, done.request_counts.completed) == ("cancelled", 0)


def test_one_key_s_idempotent_answer_is_not_another_s(server: Live) -> None:
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": "mine"}]}
    headers = {"Idempotency-Key": "one", "content-type": "application/json"}

    def post(client: OpenAI) -> Any:
        authorisation = {"authorization": f"Bearer {client.api_key}"}
        return server.http.post(CHAT, content=json.dumps(body), headers={**headers, **authorisation})

    first = client_of(server)
    answer = post(first)
    assert post(first).json() == answer.json()
    assert post(client_of(server)).status_code == 400  # the same project: the key is taken
    assert post(client_of(server, "proj_two")).json()["id"] != answer.json()["id"]
