"""``Idempotency-Key``: one answer for one key, however often it is asked for."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from gale.platform import idempotency
from gale.platform.access import LOCAL_OWNER
from gale.server import idempotent
from tests.server.live import Live, eventually

pytestmark = pytest.mark.both_databases

PATH = "/v1/chat/completions"


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "scripted/one", "messages": [{"role": "user", "content": text}], **more}


def post(live: Live, key: str, body: Any, path: str = PATH) -> Any:
    return live.http.post(path, json=body, headers={"idempotency-key": key})


def test_the_same_request_gets_the_same_answer_made_once(live: Live) -> None:
    finished = live.engine.finished
    first, second = (post(live, "key-1", ask("hello")) for _ in range(2))
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()  # with its id and its time
    assert ("idempotency-replayed" in first.headers, second.headers["idempotency-replayed"]) == (False, "true")
    assert live.engine.finished == finished + 1
    assert post(live, "key-2", ask("hello")).json()["id"] != first.json()["id"]


def test_the_official_client_s_retry_after_a_time_out_gets_the_answer_that_it_had_left(live: Live) -> None:
    finished = live.engine.finished
    client = OpenAI(base_url=f"{live.url}/v1", api_key="any", timeout=0.3, max_retries=5)
    answer = client.chat.completions.create(**ask("late but whole"), extra_headers={"Idempotency-Key": "key-late"})
    assert answer.choices[0].message.content == "late but whole"
    assert live.engine.finished == finished + 1


def test_another_request_with_the_same_key_is_refused(live: Live) -> None:
    assert post(live, "key-3", ask("one")).status_code == 200
    for body, path in ((ask("two"), PATH), (ask("one"), "/v1/completions")):
        answer = post(live, "key-3", body, path)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "idempotency_key_reused"


def test_asking_again_meanwhile_is_told_to_come_back(live: Live) -> None:
    with ThreadPoolExecutor() as pool:
        active = live.engine.active
        first = pool.submit(post, live, "key-4", ask("late answer"))
        eventually(lambda: live.engine.active > active)
        again = post(live, "key-4", ask("late answer"))
        assert (again.status_code, again.headers["retry-after"]) == (409, "1")
        assert again.json()["error"]["code"] == "idempotency_in_progress"
        assert first.result().status_code == 200
    assert post(live, "key-4", ask("late answer")).json() == first.result().json()


def test_a_failure_is_not_kept(live: Live) -> None:
    for _ in range(2):
        answer = post(live, "key-5", ask("overloaded"))
        assert (answer.status_code, "idempotency-replayed" in answer.headers) == (503, False)
    assert post(live, "key-5", ask("bug-at-once")).status_code == 500
    assert post(live, "key-5", {"model": "nobody"}).status_code == 400
    assert post(live, "key-5", ask("well")).status_code == 200


def test_streams_pass_by(live: Live) -> None:
    first, second = (post(live, "key-6", ask("a b", stream=True)) for _ in range(2))
    assert first.headers["content-type"].startswith("text/event-stream")
    assert first.text.split('"id":"')[1] != second.text.split('"id":"')[1]


def test_an_answer_that_is_too_long_to_keep_is_not_made_twice(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotent, "MOST_KEPT_BYTES", 10)
    finished = live.engine.finished
    assert post(live, "key-7", ask("long")).status_code == 200
    again = post(live, "key-7", ask("long"))
    assert (again.status_code, again.json()["error"]["code"]) == (409, "idempotency_not_kept")
    assert live.engine.finished == finished + 1


def test_keys_are_forgotten_after_a_day(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    first = post(live, "key-8", ask("day"))
    now = idempotency.now_us()
    monkeypatch.setattr(idempotency, "now_us", lambda: now + 24 * 3600 * 1_000_000 + 10_000_000)
    assert post(live, "key-8", ask("day")).json()["id"] != first.json()["id"]


def test_a_killed_process_s_key_is_free_again_soon(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = live.store.idempotency
    assert asyncio.run(kept.begin(LOCAL_OWNER.project, "key-9", "0")) is None
    assert post(live, "key-9", ask("x")).status_code == 400  # another request's
    now = idempotency.now_us()
    monkeypatch.setattr(idempotency, "now_us", lambda: now + 31_000_000)
    assert post(live, "key-9", ask("x")).status_code == 200


def test_another_project_s_key_is_another_key(live: Live) -> None:
    kept = live.store.idempotency
    post(live, "key-10", ask("mine"))

    def other_project(connection: Any) -> None:
        from sqlalchemy import insert

        from gale.platform import tables

        connection.execute(
            insert(tables.projects).values(
                id="proj_2", organisation_id=LOCAL_OWNER.organisation_id, name="two", created_at=0
            )
        )

    asyncio.run(live.store.database.write(other_project))
    assert asyncio.run(kept.begin("proj_2", "key-10", "0")) is None


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "é".encode("latin-1")])
def test_keys_that_are_none_are_refused(live: Live, key: Any) -> None:
    answer = post(live, key, ask("x"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_two_keys_and_forms_are_refused(live: Live) -> None:
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    assert live.http.post(PATH, json=ask("x"), headers=headers).status_code == 400
    client = OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("a", b"x"), purpose="evals", extra_headers={"Idempotency-Key": "a"})
    assert caught.value.param == "Idempotency-Key"


def test_who_leaves_in_the_middle_of_a_body_takes_no_key(live: Live) -> None:
    body = json.dumps(ask("gone")).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: key-11\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body[:10])
    assert post(live, "key-11", ask("gone")).status_code == 200
