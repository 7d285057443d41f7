"""The keys of an organisation: its projects' and those that administer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, insert, select, update

from gale.platform import tables
from gale.platform.access import Action, Actor, authorize
from gale.platform.audit import record
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import NotFoundError
from gale.platform.ids import new_id
from gale.platform.keys import new_key, shown
from gale.platform.listing import Listing, Order, page_of
from gale.platform.organisations import require_project
from gale.platform.people import Person, people_in
from gale.platform.secret import Secret
from gale.platform.text import one_line, storable


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key: everything but the key. ``owner`` None has no place here any more.

    ``scopes`` and ``models`` None leave what the owner may.
    """

    id: str
    name: str
    prefix: str
    last4: str
    scopes: list[Action] | None
    models: list[str] | None
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    owner: Person | None
    owner_id: str

    @property
    def redacted(self) -> str:
        """What may be shown of it."""
        return f"{self.prefix}...{self.last4}"


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a new key may do, and until when."""

    name: str
    scopes: Sequence[Action] | None = None
    models: Sequence[str] | None = None
    expires_in_s: int | None = None


class ApiKeys:
    """The keys of one project, or (``project_id`` None) those that administer ``actor``'s organisation.

    Raises :class:`NotAllowedError` for who does not administer it; methods raise :class:`NotFoundError` for what is
    not in it.
    """

    def __init__(self, database: Database, secret: Secret, actor: Actor, project_id: str | None) -> None:
        authorize(actor, "administer")
        self._database = database
        self._secret = secret
        self._actor = actor
        self._project_id = project_id

    async def page(self, *, limit: int = 20, after: str | None = None, order: Order = "desc") -> Listing[ApiKey]:
        """Those that were not revoked. Raises :class:`CursorError`."""

        def work(connection: Connection) -> Listing[ApiKey]:
            self._require_project(connection)
            found = page_of(connection, self._keys(), tables.api_keys, limit=limit, after=after, order=order)
            return Listing([self._key(connection, row) for row in found.items], found.has_more)

        return await self._database.read(work)

    async def get(self, key_id: str) -> ApiKey:
        """One of them."""
        return await self._database.read(lambda connection: self._require(connection, key_id))

    async def create(self, new: NewKey, owner_id: str | None = None) -> tuple[ApiKey, str]:
        """A new key, and its text, which cannot be had again. It is ``owner_id``'s, or else the actor's own.

        Raises :class:`ConflictError` for an archived project.
        """
        text = new_key(admin=self._project_id is None)
        digest, key_id, now = self._secret.digest("key", text), new_id("key"), now_us()
        prefix, last4 = shown(text)

        def work(connection: Connection) -> ApiKey:
            if self._project_id is not None:
                require_project(connection, self._actor, self._project_id, open=True)
            owner = self._owner(connection, owner_id or self._actor.user_id or "")
            if owner is None or (self._project_id is None and owner.role != "owner"):
                raise NotFoundError("There is nobody of this id who could own such a key.")
            connection.execute(
                insert(tables.api_keys).values(
                    id=key_id,
                    organisation_id=self._actor.organisation_id,
                    project_id=self._project_id,
                    user_id=owner.id,
                    name=one_line(new.name),
                    prefix=prefix,
                    last4=last4,
                    digest=digest,
                    scopes=None if new.scopes is None else sorted(new.scopes),
                    models=None if new.models is None else [storable(model) for model in new.models],
                    created_at=now,
                    expires_at=_end(now, new.expires_in_s),
                )
            )
            details = {"data": {"scopes": sorted(new.scopes or [])}}
            record(connection, self._actor, "api_key.created", key_id, details, project_id=self._project_id)
            return self._require(connection, key_id)

        return await self._database.write(work), text

    async def change(
        self, key_id: str, *, scopes: Sequence[Action] | None = None, expires_in_s: int | None = None
    ) -> ApiKey:
        """Narrow or widen it (an empty list of scopes: whatever its owner may), or let it end at another time."""

        def work(connection: Connection) -> ApiKey:
            known = self._require(connection, key_id)
            values: dict[str, Any] = {}
            if scopes is not None:
                values["scopes"] = sorted(scopes) or None
            if expires_in_s is not None:
                values["expires_at"] = _end(now_us(), expires_in_s)
            if values:
                connection.execute(update(tables.api_keys).where(tables.api_keys.c.id == known.id).values(**values))
            details = {"changes_requested": {"scopes": sorted(scopes or [])}}
            record(connection, self._actor, "api_key.updated", known.id, details, project_id=self._project_id)
            return self._require(connection, known.id)

        return await self._database.write(work)

    async def revoke(self, key_id: str) -> None:
        """End it for good."""

        def work(connection: Connection) -> None:
            known = self._require(connection, key_id)
            table = tables.api_keys
            connection.execute(update(table).where(table.c.id == known.id).values(revoked_at=now_us()))
            record(connection, self._actor, "api_key.deleted", known.id, project_id=self._project_id)

        await self._database.write(work)

    def _keys(self) -> Select[Any]:
        table = tables.api_keys
        return select(table).where(
            table.c.organisation_id == self._actor.organisation_id,
            table.c.project_id.is_(None) if self._project_id is None else table.c.project_id == self._project_id,
            table.c.revoked_at.is_(None),
        )

    def _require(self, connection: Connection, key_id: str) -> ApiKey:
        self._require_project(connection)
        row = connection.execute(self._keys().where(tables.api_keys.c.id == storable(key_id))).one_or_none()
        if row is None:
            raise NotFoundError("There is no such key.")
        return self._key(connection, row)

    def _require_project(self, connection: Connection) -> None:
        if self._project_id is not None:
            require_project(connection, self._actor, self._project_id)

    def _key(self, connection: Connection, row: Row[Any]) -> ApiKey:
        return ApiKey(
            row.id,
            row.name,
            row.prefix,
            row.last4,
            row.scopes,
            row.models,
            row.created_at,
            row.last_used_at,
            row.expires_at,
            self._owner(connection, row.user_id),
            row.user_id,
        )

    def _owner(self, connection: Connection, user_id: str) -> Person | None:
        """Whoever it is, as an owner of the organisation or else in the project; None who has no place there."""
        users = tables.users
        for project_id in (None, self._project_id):
            query = people_in(self._actor, project_id).where(
                users.c.id == storable(user_id), users.c.disabled_at.is_(None)
            )
            row = connection.execute(query).one_or_none()
            if row is not None and (project_id is not None or row.role == "owner"):
                return Person(*tuple(row))
        return None


def _end(now: int, seconds: int | None) -> int | None:
    return None if seconds is None else now + seconds * 1_000_000
