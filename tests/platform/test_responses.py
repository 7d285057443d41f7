"""Kept answers and conversations of items, in either database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from gale.platform import responses as module
from gale.platform.access import LOCAL_OWNER, NotAllowedError
from gale.platform.errors import ConflictError, NotFoundError
from gale.platform.responses import KeptResponse, TooLongError, tidy
from gale.platform.store import Store
from tests.platform.rows import run

OTHER = replace(LOCAL_OWNER, project_id="proj_other")


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store.open(database_url)
    yield opened
    opened.close()


def item(name: str) -> dict[str, Any]:
    return {"id": name, "type": "message", "text": "nul \0 and 中"}


def kept(name: str, *, previous: str | None = None, conversation: str | None = None, status: str = "completed") -> Any:
    body = {
        "id": name,
        "status": status,
        "previous_response_id": previous,
        "conversation": {"id": conversation} if conversation else None,
        "output": [item(f"{name}_out")],
    }
    return KeptResponse(name, [item(f"{name}_in")], body)


def test_a_chain_is_read_oldest_first_and_by_its_project_only(store: Store) -> None:
    mine, other = store.responses(LOCAL_OWNER), store.responses(OTHER)
    run(mine.save(kept("a")))
    run(mine.save(kept("b", previous="a")))
    assert [each["id"] for each in run(mine.history("b"))] == ["a_in", "a_out", "b_in", "b_out"]
    assert run(mine.get("b")) == kept("b", previous="a")
    for work in (other.get("a"), other.history("b"), other.delete("a")):
        with pytest.raises(NotFoundError):
            run(work)
    run(mine.delete("a"))
    with pytest.raises(NotFoundError):
        run(mine.history("b"))


def test_an_unfinished_response_is_neither_built_on_nor_deleted(store: Store) -> None:
    mine = store.responses(LOCAL_OWNER)
    run(mine.save(kept("a", status="in_progress")))
    for work in (mine.history("a"), mine.delete("a")):
        with pytest.raises(ConflictError):
            run(work)
    run(tidy(store.database, unfinished_before=time.time_ns() // 1000 + 1))
    assert run(mine.get("a")).body["status"] == "failed"
    run(mine.delete("a"))


def test_a_finished_response_joins_its_conversation_once(store: Store) -> None:
    mine, conversations = store.responses(LOCAL_OWNER), store.item_conversations(LOCAL_OWNER)
    conversation = run(conversations.create({"a": "b"}, [item("first")]))
    run(mine.save(kept("a", conversation=conversation.id, status="queued")))
    run(mine.save(kept("a", conversation=conversation.id)))
    assert [each["id"] for each in run(conversations.items(conversation.id))] == ["first", "a_in", "a_out"]
    run(conversations.delete_item(conversation.id, "a_in"))
    run(conversations.add(conversation.id, [item("last")]))
    assert [each["id"] for each in run(conversations.items(conversation.id))] == ["first", "a_out", "last"]
    other = store.item_conversations(OTHER)
    for work in (
        other.get(conversation.id),
        other.items(conversation.id),
        other.add(conversation.id, []),
        other.change(conversation.id, {}),
        other.delete_item(conversation.id, "first"),
        other.delete(conversation.id),
        store.responses(OTHER).save(kept("c", conversation=conversation.id)),
    ):
        with pytest.raises(NotFoundError):
            run(work)  # type: ignore[arg-type]
    run(conversations.delete(conversation.id))
    with pytest.raises(NotFoundError):
        run(conversations.items(conversation.id))


def test_what_is_old_is_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = store.responses(LOCAL_OWNER)
    monkeypatch.setattr(module, "now_us", lambda: 1_000_000)
    run(mine.save(kept("a")))
    monkeypatch.undo()
    with pytest.raises(NotFoundError):
        run(mine.get("a"))
    run(tidy(store.database, unfinished_before=0))


def test_conversations_and_chains_have_an_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ITEMS", 2)
    monkeypatch.setattr(module, "MOST_TURNS", 1)
    conversations, mine = store.item_conversations(LOCAL_OWNER), store.responses(LOCAL_OWNER)
    conversation = run(conversations.create({}, [item("a"), item("b")]))
    with pytest.raises(TooLongError):
        run(conversations.add(conversation.id, [item("c")]))
    run(mine.save(kept("a")))
    run(mine.save(kept("b", previous="a")))
    with pytest.raises(TooLongError):
        run(mine.history("b"))


def test_a_reader_reads_and_changes_nothing(store: Store) -> None:
    run(store.responses(LOCAL_OWNER).save(kept("a")))
    conversation = run(store.item_conversations(LOCAL_OWNER).create({}, [item("first")]))
    reader = replace(LOCAL_OWNER, role="reader")
    assert run(store.responses(reader).get("a")).id == "a"
    conversations = store.item_conversations(reader)
    assert len(run(conversations.items(conversation.id))) == 1
    for work in (
        store.responses(reader).delete("a"),
        store.responses(replace(LOCAL_OWNER, scopes=frozenset({"use"}))).get("a"),
        conversations.create({}, []),
        conversations.add(conversation.id, []),
        conversations.change(conversation.id, {}),
        conversations.delete_item(conversation.id, "first"),
        conversations.delete(conversation.id),
    ):
        with pytest.raises(NotAllowedError):
            run(work)  # type: ignore[arg-type]


def test_an_answer_outlives_its_conversation(store: Store) -> None:
    mine, conversations = store.responses(LOCAL_OWNER), store.item_conversations(LOCAL_OWNER)
    conversation = run(conversations.create({}, []))
    run(mine.save(kept("a", conversation=conversation.id, status="in_progress")))
    run(conversations.delete(conversation.id))
    run(mine.save(kept("a", conversation=conversation.id)))
    assert run(mine.get("a")).body["status"] == "completed"


def test_what_is_too_long_to_be_read_again_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 150)
    mine, conversations = store.responses(LOCAL_OWNER), store.item_conversations(LOCAL_OWNER)
    run(mine.save(kept("a")))
    run(mine.save(kept("b", previous="a")))
    with pytest.raises(TooLongError):
        run(mine.history("b"))
    conversation = run(conversations.create({}, [item("a")]))
    with pytest.raises(TooLongError):
        run(conversations.add(conversation.id, [item("b"), item("c")]))
