"""Conversations and their trees of messages.

A conversation is a tree because people edit and regenerate: an edited question or a second answer becomes a sibling
of the first, and nothing is overwritten. ``leaf_id`` is the end of the branch on show.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Select, delete, func, insert, select, tuple_, update

from gale.platform import tables
from gale.platform.access import Actor
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import CursorError, NotFoundError
from gale.platform.ids import new_id
from gale.platform.text import one_line, storable, title_from

Role = Literal["user", "assistant"]
Status = Literal["complete", "stopped", "length", "error"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation without its messages. Times in microseconds since 1970."""

    id: str
    title: str
    created_at: int
    updated_at: int
    leaf_id: str | None


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message; ``parent_id`` None begins a branch. Token counts are known for finished answers only."""

    id: str
    conversation_id: str
    parent_id: str | None
    role: Role
    content: str
    status: Status
    model: str | None
    created_at: int
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """Some conversations, newest first, and where the next page begins (None at the end)."""

    conversations: list[Conversation]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that was begun: the question if it is new, the answer's place, and the path that is to be answered."""

    question: StoredMessage | None
    answer: StoredMessage
    path: list[StoredMessage]


class Conversations:
    """The conversations of one person in one project. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database, actor: Actor) -> None:
        self._database = database
        self._owner = {"project_id": actor.project, "user_id": actor.user_id or actor.key_id or ""}

    async def create(self) -> Conversation:
        """A new, empty conversation; its title comes with the first question."""
        now = now_us()
        conversation = Conversation(new_id("conv"), "", now, now, None)

        def work(connection: Connection) -> None:
            connection.execute(
                insert(tables.conversations).values(
                    id=conversation.id, title="", created_at=now, updated_at=now, leaf_id=None, **self._owner
                )
            )

        await self._database.write(work)
        return conversation

    async def page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """At most ``limit`` conversations, the last used first. Raises :class:`CursorError`."""
        table = tables.conversations
        query = _owned_by(self._owner).order_by(table.c.updated_at.desc(), table.c.id.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(tuple_(table.c.updated_at, table.c.id) < tuple_(*_decode_cursor(cursor)))

        rows = await self._database.read(lambda connection: connection.execute(query).all())
        found = [Conversation(*row) for row in rows[:limit]]
        return Page(found, _encode_cursor(found[-1]) if len(rows) > limit else None)

    async def get(self, conversation_id: str) -> tuple[Conversation, list[StoredMessage]]:
        """A conversation and all its messages in order of creation. Raises :class:`NotFoundError`."""

        def work(connection: Connection) -> tuple[Conversation, list[StoredMessage]]:
            return self._conversation(connection, conversation_id), _messages(connection, conversation_id)

        return await self._database.read(work)

    async def change(
        self, conversation_id: str, *, title: str | None = None, leaf_id: str | None = None
    ) -> Conversation:
        """Rename a conversation or show another branch. Raises :class:`NotFoundError` for a foreign ``leaf_id``."""
        values: dict[str, str] = {}
        if title is not None:
            values["title"] = one_line(title)
        if leaf_id is not None:
            values["leaf_id"] = leaf_id

        def work(connection: Connection) -> Conversation:
            self._conversation(connection, conversation_id)
            if leaf_id is not None:
                _message(connection, conversation_id, leaf_id)
            if values:
                _update_conversation(connection, conversation_id, values)
            return self._conversation(connection, conversation_id)

        return await self._database.write(work)

    async def delete(self, conversation_id: str) -> None:
        """Delete a conversation and its messages. Raises :class:`NotFoundError`."""

        def work(connection: Connection) -> None:
            self._conversation(connection, conversation_id)
            messages = tables.messages
            # Taken apart first: SQLite follows references to what is deleted no deeper than a thousand.
            own = messages.c.conversation_id == conversation_id
            connection.execute(update(messages).where(own).values(parent_id=None))
            connection.execute(delete(tables.conversations).where(tables.conversations.c.id == conversation_id))

        await self._database.write(work)

    async def ask(self, conversation_id: str, content: str, *, model: str, parent_id: str | None = None) -> Turn:
        """Store a question and a place for its answer, below ``parent_id`` (None: as a first message).

        The answer's place is stored at once, as ``stopped`` and empty, so that a process killed while answering
        leaves a conversation that can be read and continued. Raises :class:`NotFoundError`.
        """

        def work(connection: Connection) -> Turn:
            conversation = self._conversation(connection, conversation_id)
            if parent_id is not None:
                _message(connection, conversation_id, parent_id)
            question = _insert_message(connection, conversation_id, parent_id, "user", content, "complete", None)
            if not conversation.title:
                _update_conversation(connection, conversation_id, {"title": title_from(content)})
            return _begin_answer(connection, question, model, is_new=True)

        return await self._database.write(work)

    async def ask_again(self, conversation_id: str, message_id: str, *, model: str) -> Turn:
        """A place for another answer to the question that ``message_id`` answered (or is).

        Raises :class:`NotFoundError`.
        """

        def work(connection: Connection) -> Turn:
            message = _message(connection, conversation_id, message_id)
            if message.role == "assistant" and message.parent_id is not None:
                message = _message(connection, conversation_id, message.parent_id)
            return _begin_answer(connection, message, model, is_new=False)

        return await self._database.write(work)

    async def finish(
        self,
        answer: StoredMessage,
        content: str,
        status: Status,
        *,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
    ) -> tuple[StoredMessage, Conversation]:
        """Store an answer's text and how it ended.

        Raises :class:`NotFoundError` if the conversation was deleted meanwhile.
        """

        def work(connection: Connection) -> tuple[StoredMessage, Conversation]:
            connection.execute(
                update(tables.messages)
                .where(tables.messages.c.id == answer.id)
                .values(
                    content=storable(content),
                    status=status,
                    prompt_tokens=prompt_tokens,
                    completion_tokens=completion_tokens,
                )
            )
            _update_conversation(connection, answer.conversation_id, {"updated_at": now_us()})
            conversation = self._conversation(connection, answer.conversation_id)
            return _message(connection, conversation.id, answer.id), conversation

        return await self._database.write(work)

    def _conversation(self, connection: Connection, conversation_id: str) -> Conversation:
        # Another's conversation must look like one that does not exist.
        query = _owned_by(self._owner).where(tables.conversations.c.id == storable(conversation_id))
        row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("There is no such conversation.")
        return Conversation(*row)


def _owned_by(owner: dict[str, str]) -> Select[Any]:
    table = tables.conversations
    columns = (table.c.id, table.c.title, table.c.created_at, table.c.updated_at, table.c.leaf_id)
    return select(*columns).where(*(table.c[name] == value for name, value in owner.items()))


def _message(connection: Connection, conversation_id: str, message_id: str) -> StoredMessage:
    table = tables.messages
    row = connection.execute(
        # Both ids, always: a message of another conversation must look like one that does not exist.
        select(table).where(table.c.id == storable(message_id), table.c.conversation_id == storable(conversation_id))
    ).one_or_none()
    if row is None:
        raise NotFoundError("There is no such message in this conversation.")
    return StoredMessage(*row)


def _messages(connection: Connection, conversation_id: str) -> list[StoredMessage]:
    table = tables.messages
    query = select(table).where(table.c.conversation_id == conversation_id).order_by(table.c.created_at)
    return [StoredMessage(*row) for row in connection.execute(query)]


def _update_conversation(connection: Connection, conversation_id: str, values: dict[str, Any]) -> None:
    table = tables.conversations
    connection.execute(update(table).where(table.c.id == conversation_id).values(**values))


def _insert_message(
    connection: Connection,
    conversation_id: str,
    parent_id: str | None,
    role: Role,
    content: str,
    status: Status,
    model: str | None,
) -> StoredMessage:
    table = tables.messages
    latest = connection.execute(
        select(func.max(table.c.created_at)).where(table.c.conversation_id == conversation_id)
    ).scalar()
    # Later than every message before it even if the clock was set back, so that order of creation is kept.
    created_at = max(now_us(), (latest or 0) + 1)
    message = StoredMessage(
        new_id("msg"), conversation_id, parent_id, role, storable(content), status, model, created_at, None, None
    )
    connection.execute(insert(table).values({column.name: getattr(message, column.name) for column in table.columns}))
    _update_conversation(connection, conversation_id, {"updated_at": created_at, "leaf_id": message.id})
    return message


def _begin_answer(connection: Connection, question: StoredMessage, model: str, *, is_new: bool) -> Turn:
    answer = _insert_message(connection, question.conversation_id, question.id, "assistant", "", "stopped", model)
    path = _path_to(question, _messages(connection, question.conversation_id))
    return Turn(question if is_new else None, answer, path)


def _path_to(message: StoredMessage, messages: Sequence[StoredMessage]) -> list[StoredMessage]:
    by_id = {each.id: each for each in messages}
    path = [message]
    while (parent_id := path[-1].parent_id) is not None:
        path.append(by_id[parent_id])
    return path[::-1]


def _encode_cursor(conversation: Conversation) -> str:
    return base64.urlsafe_b64encode(f"{conversation.updated_at}:{conversation.id}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> tuple[int, str]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        updated_at, _, conversation_id = text.partition(":")
        position = int(updated_at)
    except (ValueError, binascii.Error) as error:
        raise CursorError("This cursor was not given out by Gale.") from error
    if not 0 <= position < 2**63:
        raise CursorError("This cursor was not given out by Gale.")
    return position, storable(conversation_id)
