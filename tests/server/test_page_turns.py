"""Turns of the chat page: streamed, stored, edited, regenerated, stopped and failed."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.server.live import Live, eventually

pytestmark = pytest.mark.both_databases

Events = list[tuple[str, dict[str, Any]]]


def new(live: Live) -> str:
    return str(live.http.post("/api/conversations", json={}).json()["id"])


def load(live: Live, conversation: str) -> dict[str, Any]:
    loaded: dict[str, Any] = live.http.get(f"/api/conversations/{conversation}").json()
    return loaded


def turn(live: Live, conversation: str, **body: Any) -> Events:
    response = live.http.post(f"/api/conversations/{conversation}/turns", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events: Events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def answer_of(events: Events) -> dict[str, Any]:
    assert events[-1][0] == "done"
    message: dict[str, Any] = events[-1][1]["message"]
    return message


def test_a_first_turn(live: Live) -> None:
    conversation = new(live)
    events = turn(live, conversation, content="say 你好\nplease", parent_id=None)
    assert [name for name, _ in events] == ["user_message", "assistant_start", "delta", "delta", "delta", "done"]
    user, start, done = events[0][1]["message"], events[1][1]["message"], events[-1][1]
    assert set(user) == {"id", "parent_id", "role", "content", "status", "model", "created_at"}
    assert (user["role"], user["content"], user["parent_id"], user["status"]) == (
        "user", "say 你好\nplease", None, "complete",
    )  # fmt: skip
    assert (start["role"], start["content"], start["parent_id"], start["status"]) == (
        "assistant", "", user["id"], "streaming",
    )  # fmt: skip
    assert "".join(data["text"] for name, data in events if name == "delta") == "say 你好 please"
    assert done["message"] == {**start, "content": "say 你好 please", "status": "complete"}
    assert done["conversation"]["title"] == "say 你好 please"
    assert done["conversation"]["leaf_id"] == start["id"]
    loaded = load(live, conversation)
    assert loaded["messages"] == [user, done["message"]]
    assert loaded == {**done["conversation"], "messages": loaded["messages"]}


def test_the_model_reads_the_branch_and_nothing_else(live: Live) -> None:
    conversation = new(live)
    first = answer_of(turn(live, conversation, content="one", parent_id=None))
    answer_of(turn(live, conversation, content="two", parent_id=first["id"]))
    edited = turn(live, conversation, content="two, edited", parent_id=first["id"])
    assert [message["content"] for message in live.engine.prompts[-1]] == ["one", "one", "two, edited"]
    assert edited[0][1]["message"]["parent_id"] == first["id"]
    third = answer_of(turn(live, conversation, content="three", parent_id=answer_of(edited)["id"]))
    assert [message["content"] for message in live.engine.prompts[-1]][-1] == "three"
    assert "two" not in [message["content"] for message in live.engine.prompts[-1]]
    # Another beginning is a branch of its own; without parent_id a turn continues what is on show.
    turn(live, conversation, content="another beginning", parent_id=None)
    assert [message["content"] for message in live.engine.prompts[-1]] == ["another beginning"]
    url = f"/api/conversations/{conversation}"
    assert live.http.patch(url, json={"leaf_id": third["id"]}).json()["leaf_id"] == third["id"]
    turn(live, conversation, content="four")
    assert len(live.engine.prompts[-1]) == 7
    assert load(live, conversation)["title"] == "one"


def test_regenerating_adds_a_sibling(live: Live) -> None:
    conversation = new(live)
    first = answer_of(turn(live, conversation, content="hello", parent_id=None))
    events = turn(live, conversation, regenerate=first["id"])
    assert [name for name, _ in events] == ["assistant_start", "delta", "done"]
    second = answer_of(events)
    assert second["parent_id"] == first["parent_id"]
    assert second["id"] != first["id"]
    loaded = load(live, conversation)
    assert [message["role"] for message in loaded["messages"]] == ["user", "assistant", "assistant"]
    assert loaded["leaf_id"] == second["id"]
    # A question that was never answered, after a crash, is answered by naming the question itself.
    assert answer_of(turn(live, conversation, regenerate=first["parent_id"]))["parent_id"] == first["parent_id"]


def test_an_answer_cut_by_its_length_says_so(live: Live) -> None:
    answer = answer_of(turn(live, new(live), content="w " * 60, parent_id=None))
    assert answer["status"] == "length"
    assert len(answer["content"].split()) == 39


def test_a_long_conversation_forgets_its_beginning(live: Live) -> None:
    conversation, parent = new(live), None
    for number in range(8):
        parent = answer_of(turn(live, conversation, content=f"{number} " + "w " * 10, parent_id=parent))["id"]
    read = live.engine.prompts[-1]
    assert read[0]["role"] == "user"
    assert read[0]["content"][0] not in "01"
    assert len(load(live, conversation)["messages"]) == 16


def test_a_question_that_cannot_fit_is_refused_and_not_stored(live: Live) -> None:
    conversation = new(live)
    body = {"content": "w " * 99, "parent_id": None}
    response = live.http.post(f"/api/conversations/{conversation}/turns", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert load(live, conversation)["messages"] == []


@pytest.mark.parametrize(
    ("script", "code", "content"),
    [
        ("breaks", "engine_failed", "half "),
        ("unfinished", "engine_failed", "half "),
        ("bug", "internal_error", "half "),
        ("overloaded", "engine_overloaded", ""),
    ],
)
def test_failures_are_told_and_stored(live: Live, script: str, code: str, content: str) -> None:
    conversation = new(live)
    events = turn(live, conversation, content=script, parent_id=None)
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["code"] == code
    assert "secret" not in json.dumps(events)
    answer = load(live, conversation)["messages"][1]
    assert (answer["status"], answer["content"]) == ("error", content)
    assert answer_of(turn(live, conversation, content="again", parent_id=answer["id"]))["content"] == "again"


def hang_up(live: Live, conversation: str, content: str, after: bytes) -> None:
    body = json.dumps({"content": content, "parent_id": None}).encode()
    head = f"POST /api/conversations/{conversation}/turns HTTP/1.1\r\nHost: localhost\r\n".encode()
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
        sock.sendall(head + body)
        answer = b""
        while after not in answer:
            part = sock.recv(65536)
            assert part, answer
            answer += part


def test_hanging_up_stores_what_there_was_as_stopped(live: Live) -> None:
    conversation = new(live)
    hang_up(live, conversation, "endless", b"tick")
    eventually(lambda: load(live, conversation)["messages"][1]["content"].startswith("tick "))
    user, answer = load(live, conversation)["messages"]
    assert (user["content"], user["status"], answer["status"]) == ("endless", "complete", "stopped")
    eventually(lambda: live.engine.active == 0)


def test_hanging_up_before_the_first_word_stores_an_empty_answer(live: Live) -> None:
    conversation = new(live)
    hang_up(live, conversation, "silent", b"assistant_start")
    eventually(lambda: live.engine.active == 0)
    answer = load(live, conversation)["messages"][1]
    assert (answer["status"], answer["content"]) == ("stopped", "")
    # Even at once after stopping, the conversation can go on below the stopped answer, which says nothing.
    assert answer_of(turn(live, conversation, content="go on", parent_id=answer["id"]))["content"] == "go on"


def test_deleting_a_conversation_while_it_is_answered(live: Live) -> None:
    conversation = new(live)
    with live.http.stream(
        "POST", f"/api/conversations/{conversation}/turns", json={"content": "late words", "parent_id": None}
    ) as response:
        assert live.http.delete(f"/api/conversations/{conversation}").status_code == 204
        text = response.read().decode()
    assert text.strip().split("\n\n")[-1].startswith("event: error\n")
    assert load(live, conversation)["error"]["code"] == "not_found"


def test_wrong_ids_and_bodies(live: Live) -> None:
    conversation, other = new(live), new(live)
    foreign = answer_of(turn(live, other, content="hello", parent_id=None))["id"]
    url = f"/api/conversations/{conversation}"
    for body in (
        {"content": "x", "parent_id": "msg_nothing"},
        {"content": "x", "parent_id": foreign},
        {"regenerate": foreign},
        {"regenerate": "msg_nothing"},
    ):
        response = live.http.post(f"{url}/turns", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert live.http.patch(url, json={"leaf_id": foreign}).status_code == 404
    for body in ({}, {"content": " "}, {"content": "x", "regenerate": "y"}, {"content": 3}, {"content": "a\0"}):
        assert live.http.post(f"{url}/turns", json=body).status_code == 400
    assert load(live, conversation)["messages"] == []
    assert load(live, conversation)["title"] == ""
