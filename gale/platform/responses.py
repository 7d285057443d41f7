"""Answers of the Responses API that were asked to be kept, and its conversations of items.

Items are JSON objects with an ``id``, kept as they are shown. Everything belongs to a project.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Text, cast, delete, func, insert, select, update

from gale.core.errors import GaleError
from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, NotFoundError
from gale.platform.ids import new_id
from gale.platform.text import storable
from gale.platform.usage import DAY_US

Item = dict[str, Any]

KEPT_DAYS = 30
# Answers that one answer may build on, and items of one conversation: reading them takes time.
MOST_TURNS = 1000
MOST_ITEMS = 10_000
MOST_CHARACTERS = 16 * 1024 * 1024
UNFINISHED = ("queued", "in_progress")


class TooLongError(GaleError):
    """A chain of answers or a conversation that has become too long to go on with."""


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response with the items that its request brought; ``body`` is the object as it is shown."""

    id: str
    input: list[Item]
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ItemConversation:
    """A conversation of items, without them. ``created_at`` in microseconds since 1970."""

    id: str
    metadata: dict[str, str]
    created_at: int


class Responses:
    """The kept responses of one project. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database, actor: Actor) -> None:
        self._database = database
        self._actor = actor
        self._project = actor.project

    async def save(self, kept: KeptResponse) -> None:
        """Keep a response, or its new state; a finished one is added to its conversation, if it has one."""
        body, table = kept.body, tables.responses
        conversation_id = (body.get("conversation") or {}).get("id")

        def work(connection: Connection) -> None:
            values = {"status": body["status"], "body": body}
            changed = connection.execute(update(table).where(table.c.id == kept.id).values(**values)).rowcount
            if not changed:
                if conversation_id is not None:
                    _conversation(connection, self._project, conversation_id)
                now = now_us()
                connection.execute(
                    insert(table).values(
                        id=kept.id,
                        project_id=self._project,
                        previous_id=body["previous_response_id"],
                        conversation_id=conversation_id,
                        input=kept.input,
                        created_at=now,
                        expires_at=now + KEPT_DAYS * DAY_US,
                        **values,
                    )
                )
            if conversation_id is not None and body["status"] in ("completed", "incomplete"):
                # The answer stands by itself where its conversation was deleted, or became too long, meanwhile.
                with contextlib.suppress(NotFoundError, TooLongError):
                    _conversation(connection, self._project, conversation_id)
                    _append(connection, conversation_id, [*kept.input, *body["output"]])

        await self._database.write(work)

    async def get(self, response_id: str) -> KeptResponse:
        """Raises :class:`NotFoundError` and :class:`NotAllowedError`."""
        authorize(self._actor, "read")
        return await self._database.read(lambda connection: _response(connection, self._project, response_id)[0])

    async def delete(self, response_id: str) -> None:
        """Raises :class:`NotFoundError`, :class:`NotAllowedError`, and :class:`ConflictError` while it is answered."""
        authorize(self._actor, "write")

        def work(connection: Connection) -> None:
            kept, _ = _response(connection, self._project, response_id)
            if kept.body["status"] in UNFINISHED:
                raise ConflictError("This response is still being answered; cancel it first.")
            connection.execute(delete(tables.responses).where(tables.responses.c.id == kept.id))

        await self._database.write(work)

    async def history(self, response_id: str) -> list[Item]:
        """All items that lead to ``response_id`` and its own, oldest first.

        Raises :class:`NotFoundError`, :class:`TooLongError`, and :class:`ConflictError` for one that is unfinished.
        """

        def work(connection: Connection) -> list[Item]:
            turns: list[list[Item]] = []
            next_id: str | None = response_id
            left = MOST_CHARACTERS
            while next_id is not None:
                if len(turns) == MOST_TURNS:
                    raise TooLongError(f"More than {MOST_TURNS} responses lead to this one.")
                kept, next_id = _response(connection, self._project, next_id)
                if kept.body["status"] in UNFINISHED:
                    raise ConflictError("That response is still being answered.")
                turns.append([*kept.input, *kept.body["output"]])
                if (left := left - _characters(turns[-1])) < 0:
                    raise TooLongError("What leads to this response is too long to be read again.")
            return [item for turn in reversed(turns) for item in turn]

        return await self._database.read(work)


class ItemConversations:
    """The conversations of items of one project.

    Every method may raise :class:`StoreError`, and :class:`NotAllowedError` where the actor may not do it.
    """

    def __init__(self, database: Database, actor: Actor) -> None:
        self._database = database
        self._actor = actor
        self._project = actor.project

    async def create(self, metadata: dict[str, str], items: Sequence[Item]) -> ItemConversation:
        """A new conversation that begins with ``items``."""
        authorize(self._actor, "write")
        conversation = ItemConversation(new_id("conv"), metadata, now_us())

        def work(connection: Connection) -> None:
            connection.execute(
                insert(tables.response_conversations).values(
                    id=conversation.id,
                    project_id=self._project,
                    metadata=metadata,
                    created_at=conversation.created_at,
                )
            )
            _append(connection, conversation.id, items)

        await self._database.write(work)
        return conversation

    async def get(self, conversation_id: str) -> ItemConversation:
        """Raises :class:`NotFoundError`."""
        authorize(self._actor, "read")
        return await self._database.read(lambda connection: _conversation(connection, self._project, conversation_id))

    async def change(self, conversation_id: str, metadata: dict[str, str]) -> ItemConversation:
        """Replace the metadata. Raises :class:`NotFoundError`."""
        authorize(self._actor, "write")
        table = tables.response_conversations

        def work(connection: Connection) -> ItemConversation:
            _conversation(connection, self._project, conversation_id)
            connection.execute(update(table).where(table.c.id == conversation_id).values(metadata=metadata))
            return _conversation(connection, self._project, conversation_id)

        return await self._database.write(work)

    async def delete(self, conversation_id: str) -> None:
        """Delete a conversation with its items. Raises :class:`NotFoundError`."""
        authorize(self._actor, "write")
        table = tables.response_conversations

        def work(connection: Connection) -> None:
            _conversation(connection, self._project, conversation_id)
            connection.execute(delete(table).where(table.c.id == conversation_id))

        await self._database.write(work)

    async def add(self, conversation_id: str, items: Sequence[Item]) -> None:
        """Raises :class:`NotFoundError` and :class:`TooLongError`."""
        authorize(self._actor, "write")

        def work(connection: Connection) -> None:
            _conversation(connection, self._project, conversation_id)
            _append(connection, conversation_id, items)

        await self._database.write(work)

    async def items(self, conversation_id: str) -> list[Item]:
        """All items, oldest first. Raises :class:`NotFoundError`."""
        authorize(self._actor, "read")
        table = tables.response_items

        def work(connection: Connection) -> list[Item]:
            _conversation(connection, self._project, conversation_id)
            query = select(table.c.body).where(table.c.conversation_id == conversation_id).order_by(table.c.position)
            return list(connection.execute(query).scalars())

        return await self._database.read(work)

    async def delete_item(self, conversation_id: str, item_id: str) -> ItemConversation:
        """Raises :class:`NotFoundError`."""
        authorize(self._actor, "write")
        table = tables.response_items

        def work(connection: Connection) -> ItemConversation:
            conversation = _conversation(connection, self._project, conversation_id)
            here = (table.c.id == storable(item_id), table.c.conversation_id == conversation_id)
            if not connection.execute(delete(table).where(*here)).rowcount:
                raise NotFoundError("There is no such item in this conversation.")
            return conversation

        return await self._database.write(work)


async def tidy(database: Database, *, unfinished_before: int) -> None:
    """Delete what is older than :data:`KEPT_DAYS`, and end as failed what was begun before ``unfinished_before``
    (microseconds since 1970) and is still unfinished: the process that was at it is gone."""
    table = tables.responses

    def work(connection: Connection) -> None:
        connection.execute(delete(table).where(table.c.expires_at <= now_us()))
        left = select(table.c.id, table.c.body).where(
            table.c.status.in_(UNFINISHED), table.c.created_at < unfinished_before
        )
        for response_id, body in connection.execute(left).all():
            error = {"code": "server_error", "message": "The server stopped before it had answered."}
            failed = {**body, "status": "failed", "error": error}
            connection.execute(update(table).where(table.c.id == response_id).values(status="failed", body=failed))

    await database.write(work)


def _response(connection: Connection, project_id: str, response_id: str) -> tuple[KeptResponse, str | None]:
    table = tables.responses
    row = connection.execute(
        select(table.c.id, table.c.input, table.c.body, table.c.previous_id).where(
            table.c.id == storable(response_id), table.c.project_id == project_id, table.c.expires_at > now_us()
        )
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no response with the id '{storable(response_id)[:100]}'.")
    return KeptResponse(row.id, row.input, row.body), row.previous_id


def _conversation(connection: Connection, project_id: str, conversation_id: str) -> ItemConversation:
    table = tables.response_conversations
    row = connection.execute(
        select(table.c.id, table.c.metadata, table.c.created_at).where(
            table.c.id == storable(conversation_id), table.c.project_id == project_id
        )
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no conversation with the id '{storable(conversation_id)[:100]}'.")
    return ItemConversation(*row)


def _append(connection: Connection, conversation_id: str, items: Sequence[Item]) -> None:
    table = tables.response_items
    last = connection.execute(
        select(func.max(table.c.position)).where(table.c.conversation_id == conversation_id)
    ).scalar()
    begin = 0 if last is None else last + 1
    if begin + len(items) > MOST_ITEMS:
        raise TooLongError(f"A conversation has at most {MOST_ITEMS} items.")
    size = func.sum(func.length(cast(table.c.body, Text)))
    held = connection.execute(select(size).where(table.c.conversation_id == conversation_id)).scalar() or 0
    if held + _characters(items) > MOST_CHARACTERS:
        raise TooLongError("This conversation has become too long.")
    now = now_us()
    rows = [
        {
            "id": item["id"],
            "conversation_id": conversation_id,
            "position": begin + place,
            "body": item,
            "created_at": now,
        }
        for place, item in enumerate(items)
    ]
    if rows:
        connection.execute(insert(table), rows)


def _characters(items: Sequence[Item]) -> int:
    return len(json.dumps(items))
