"""The audit log: what was done to an organisation and by whom, written with what it records or not at all.

The database refuses to change or delete an event. Types and shapes are OpenAI's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, insert, select

from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.ids import new_id
from gale.platform.listing import Listing, page_of
from gale.platform.text import storable

EventType = Literal[
    "api_key.created",
    "api_key.updated",
    "api_key.deleted",
    "budget.deleted",  # those of budgets and fine-tuning are ours
    "budget.updated",
    "fine_tuned_model.deleted",
    "fine_tuning_job.cancelled",
    "fine_tuning_job.created",
    "fine_tuning_job.paused",
    "fine_tuning_job.resumed",
    "login.succeeded",
    "login.failed",
    "logout.succeeded",
    "organization.updated",
    "project.created",
    "project.updated",
    "project.archived",
    "rate_limit.updated",
    "rate_limit.deleted",
    "service_account.created",
    "service_account.updated",
    "service_account.deleted",
    "user.added",
    "user.updated",
    "user.deleted",
]


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event; ``actor`` is OpenAI's object and ``details`` what stands under the event's type."""

    id: str
    project_id: str | None
    type: EventType
    actor: dict[str, Any]
    details: dict[str, Any]
    created_at: int


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events to list: those that meet every condition given. Times in microseconds."""

    after_us: int | None = None
    before_us: int | None = None
    types: Sequence[str] = ()
    project_ids: Sequence[str] = ()
    actor_ids: Sequence[str] = ()
    actor_emails: Sequence[str] = ()
    resource_ids: Sequence[str] = ()


class AuditLog:
    """The events of the organisation that ``actor`` administers. Raises :class:`NotAllowedError` for others."""

    def __init__(self, database: Database, actor: Actor) -> None:
        authorize(actor, "administer")
        self._database = database
        self._organisation_id = actor.organisation_id

    async def page(self, wanted: AuditFilter, *, limit: int = 20, after: str | None = None) -> Listing[AuditEvent]:
        """The newest events first. Raises :class:`CursorError`."""
        table = tables.audit_events
        columns = (table.c.id, table.c.project_id, table.c.type, table.c.actor, table.c.details, table.c.created_at)
        query = select(*columns).where(table.c.organisation_id == self._organisation_id)
        if wanted.after_us is not None:
            query = query.where(table.c.created_at >= wanted.after_us)
        if wanted.before_us is not None:
            query = query.where(table.c.created_at < wanted.before_us)
        if wanted.types:
            query = query.where(table.c.type.in_(_storable(wanted.types)))
        if wanted.project_ids:
            query = query.where(table.c.project_id.in_(_storable(wanted.project_ids)))
        if wanted.resource_ids:
            query = query.where(table.c.resource_id.in_(_storable(wanted.resource_ids)))
        if wanted.actor_ids:
            ids = _storable(wanted.actor_ids)
            query = query.where(table.c.user_id.in_(ids) | table.c.api_key_id.in_(ids))
        if wanted.actor_emails:
            emails = [email.lower() for email in _storable(wanted.actor_emails)]
            users = select(tables.users.c.id).where(tables.users.c.email.in_(emails))
            query = query.where(table.c.user_id.in_(users))
        found = await self._database.read(
            lambda connection: page_of(connection, query, table, limit=limit, after=after, order="desc")
        )
        return Listing([AuditEvent(*tuple(row)) for row in found.items], found.has_more)


def record(
    connection: Connection,
    actor: Actor,
    type: EventType,
    resource_id: str | None,
    details: dict[str, Any] | None = None,
    *,
    project_id: str | None = None,
    address: str | None = None,
) -> None:
    """Write an event within the caller's transaction.

    ``details`` must not hold secrets. ``address`` is where a browser's request came from.
    """
    table = tables.audit_events
    connection.execute(
        insert(table).values(
            id=new_id("audit_log"),
            organisation_id=actor.organisation_id,
            project_id=project_id,
            type=type,
            user_id=actor.user_id,
            api_key_id=actor.key_id,
            resource_id=resource_id,
            actor=_describe(connection, actor, address),
            details={**({} if resource_id is None else {"id": resource_id}), **(details or {})},
            created_at=now_us(),
        )
    )


def _describe(connection: Connection, actor: Actor, address: str | None) -> dict[str, Any]:
    """OpenAI's object for ``actor``; a session without a user is the server's own shell, or nobody who is known."""
    users = tables.users
    user = connection.execute(select(users.c.kind, users.c.email).where(users.c.id == actor.user_id)).one_or_none()
    about = {"id": actor.user_id, **({"email": user.email} if user is not None and user.email else {})}
    if actor.key_id is None:
        place = {} if address is None else {"ip_address": address}
        return {"type": "session", "session": {**({"user": about} if actor.user_id else {}), **place}}
    kind = "service_account" if user is not None and user.kind == "service" else "user"
    return {"type": "api_key", "api_key": {"id": actor.key_id, "type": kind, kind: about}}


def _storable(texts: Sequence[str]) -> list[str]:
    return [storable(text) for text in texts]
