"""Conversations and their trees."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from sqlalchemy import insert

from gale.platform import conversations as module
from gale.platform import tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.conversations import Conversations
from gale.platform.errors import CursorError, NotFoundError
from gale.platform.store import Store
from tests.databases import execute
from tests.platform.rows import run


@pytest.fixture
def conversations(database_url: str) -> Iterator[Conversations]:
    store = Store.open(database_url)
    yield store.conversations(LOCAL_OWNER)
    store.close()


def test_ids_are_random_and_fit_a_url(conversations: Conversations) -> None:
    ids = {run(conversations.create()).id for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch(r"conv_[A-Za-z0-9_-]{22}", each) for each in ids)


def test_a_tree_of_turns(conversations: Conversations) -> None:
    conversation = run(conversations.create())
    first = run(conversations.ask(conversation.id, "one", model="m"))
    assert [message.content for message in first.path] == ["one"]
    assert first.answer.parent_id == first.path[0].id
    run(conversations.finish(first.answer, "1", "complete", prompt_tokens=3, completion_tokens=1))
    second = run(conversations.ask(conversation.id, "two", model="m", parent_id=first.answer.id))
    assert [message.content for message in second.path] == ["one", "1", "two"]
    again = run(conversations.ask_again(conversation.id, second.answer.id, model="m2"))
    assert again.question is None
    assert again.path == second.path
    loaded, messages = run(conversations.get(conversation.id))
    assert loaded.leaf_id == again.answer.id
    assert loaded.title == "one"
    assert [message.role for message in messages] == ["user", "assistant", "user", "assistant", "assistant"]
    assert messages == sorted(messages, key=lambda message: message.created_at)
    assert (messages[1].content, messages[1].status, messages[1].prompt_tokens) == ("1", "complete", 3)
    assert [message.model for message in messages] == [None, "m", None, "m", "m2"]


def test_order_of_creation_survives_a_clock_that_is_set_back(
    conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = run(conversations.create())
    first = run(conversations.ask(conversation.id, "one", model="m"))
    monkeypatch.setattr(module, "now_us", lambda: 5)
    second = run(conversations.ask(conversation.id, "two", model="m", parent_id=first.answer.id))
    _, messages = run(conversations.get(conversation.id))
    assert [message.id for message in messages[2:]] == [second.path[-1].id, second.answer.id]


def test_pages_in_order_of_last_use_even_with_equal_times(
    conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "now_us", lambda: 1_000_000)
    expected = sorted((run(conversations.create()).id for _ in range(5)), reverse=True)
    monkeypatch.setattr(module, "now_us", lambda: 2_000_000)
    run(conversations.ask(expected[-1], "hello", model="m"))
    expected.insert(0, expected.pop())
    seen, cursor = [], None
    for _ in range(3):
        page = run(conversations.page(2, cursor))
        seen += [each.id for each in page.conversations]
        cursor = page.next_cursor
    assert seen == expected
    assert cursor is None


@pytest.mark.parametrize("cursor", ["x", "", "é", "MTI", "LTE6YQ", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk6YQ"])
def test_bad_cursors(conversations: Conversations, cursor: str) -> None:
    if cursor == "MTI":  # "12": a position without an id, which compares like any other
        assert run(conversations.page(2, cursor)).conversations == []
        return
    with pytest.raises(CursorError):
        run(conversations.page(2, cursor))


def test_text_that_databases_refuse_is_replaced(conversations: Conversations) -> None:
    conversation = run(conversations.create())
    turn = run(conversations.ask(conversation.id, "a\0b\ud800c 🎉", model="m"))
    run(conversations.finish(turn.answer, "x\0y\udfff", "complete"))
    run(conversations.change(conversation.id, title="t\0\ud800"))
    loaded, messages = run(conversations.get(conversation.id))
    assert [message.content for message in messages] == ["a\ufffdb\ufffdc 🎉", "x\ufffdy\ufffd"]
    assert loaded.title == "t\ufffd\ufffd"


def test_ids_of_other_conversations_look_unknown(conversations: Conversations) -> None:
    mine, other = run(conversations.create()), run(conversations.create())
    foreign = run(conversations.ask(other.id, "x", model="m")).answer.id
    for work in (
        conversations.ask(mine.id, "y", model="m", parent_id=foreign),
        conversations.ask_again(mine.id, foreign, model="m"),
        conversations.change(mine.id, leaf_id=foreign),
        conversations.get("conv_nothing\0\ud800"),
        conversations.delete("conv_nothing"),
        conversations.ask("conv_nothing", "y", model="m"),
    ):
        with pytest.raises(NotFoundError):
            run(work)
    assert run(conversations.get(mine.id))[1] == []


def test_deleting_takes_the_messages_along(conversations: Conversations, database_url: str) -> None:
    conversation = run(conversations.create())
    turn = run(conversations.ask(conversation.id, "one", model="m"))
    run(conversations.ask(conversation.id, "two", model="m", parent_id=turn.answer.id))
    run(conversations.delete(conversation.id))
    assert execute(database_url, "SELECT count(*) FROM messages") == [(0,)]
    with pytest.raises(NotFoundError):
        run(conversations.finish(turn.answer, "late", "complete"))


def test_a_conversation_of_any_length_can_be_deleted(conversations: Conversations, database_url: str) -> None:
    conversation = run(conversations.create())
    row = {"conversation_id": conversation.id, "role": "user", "content": "", "status": "complete"}
    rows = [{**row, "id": f"m{n}", "parent_id": f"m{n - 1}" if n else None, "created_at": n} for n in range(1500)]
    run(conversations._database.write(lambda connection: connection.execute(insert(tables.messages), rows)))
    run(conversations.delete(conversation.id))
    assert execute(database_url, "SELECT count(*) FROM messages") == [(0,)]


def test_renaming_and_branching_do_not_change_the_order(conversations: Conversations) -> None:
    old = run(conversations.create())
    turn = run(conversations.ask(old.id, "x", model="m"))
    new = run(conversations.create())
    run(conversations.change(old.id, title="renamed"))
    run(conversations.change(old.id, leaf_id=turn.path[0].id))
    assert [each.id for each in run(conversations.page()).conversations] == [new.id, old.id]


def test_a_cancelled_caller_does_not_undo_the_write(conversations: Conversations) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(conversations.create())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())
    run(conversations.create())  # which comes after it
    assert len(run(conversations.page()).conversations) == 2
