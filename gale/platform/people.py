"""The people of an organisation: who is in it, in which of its projects, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from gale.platform import tables
from gale.platform.access import Actor, Role, authorize
from gale.platform.audit import record
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, NotFoundError
from gale.platform.ids import new_id
from gale.platform.listing import Listing, page_of
from gale.platform.organisations import require_project
from gale.platform.text import one_line, storable


@dataclass(frozen=True, slots=True)
class Person:
    """A user in an organisation, or in one of its projects, with their role there."""

    id: str
    kind: str
    email: str | None
    name: str
    created_at: int
    claimed_at: int | None
    role: Role
    added_at: int


class People:
    """The people of the organisation that ``actor`` administers. Raises :class:`NotAllowedError` for others.

    ``project_id`` None means the organisation itself. Methods raise :class:`NotFoundError` for who or what is not in
    this organisation.
    """

    def __init__(self, database: Database, actor: Actor) -> None:
        authorize(actor, "administer")
        self._database = database
        self._actor = actor

    async def page(
        self, project_id: str | None = None, *, limit: int = 20, after: str | None = None, emails: Sequence[str] = ()
    ) -> Listing[Person]:
        """Those who came last first. Raises :class:`CursorError`."""
        query = people_in(self._actor, project_id).where(tables.users.c.kind == "person")
        if emails:
            query = query.where(tables.users.c.email.in_([_email(each) for each in emails]))

        def work(connection: Connection) -> Listing[Person]:
            if project_id is not None:
                require_project(connection, self._actor, project_id)
            found = page_of(connection, query, tables.users, limit=limit, after=after)
            return Listing([Person(*tuple(row)) for row in found.items], found.has_more)

        return await self._database.read(work)

    async def get(self, user_id: str, project_id: str | None = None) -> Person:
        """One person."""
        return await self._database.read(lambda c: require_person(c, self._actor, user_id, project_id))

    async def create(self, name: str, email: str, role: Role) -> Person:
        """Add a person to the organisation. Raises :class:`ConflictError` for an address that is in use."""

        def work(connection: Connection) -> Person:
            user_id = _insert_user(connection, "person", name, _email(email))
            _insert_membership(connection, self._actor, user_id, "", role)
            details = {"data": {"role": role}}
            record(connection, self._actor, "user.added", user_id, details)
            return require_person(connection, self._actor, user_id)

        return await self._database.write(work)

    async def add(self, project_id: str, role: Role, *, user_id: str | None = None, email: str | None = None) -> Person:
        """Let one of the organisation's people into a project. Raises :class:`ConflictError` for one who is there."""

        def work(connection: Connection) -> Person:
            project = require_project(connection, self._actor, project_id, open=True)
            query = people_in(self._actor).where(tables.users.c.kind == "person")
            if user_id is not None:
                query = query.where(tables.users.c.id == storable(user_id))
            if email is not None:
                query = query.where(tables.users.c.email == _email(email))
            row = connection.execute(query).one_or_none() if user_id or email else None
            if row is None:
                raise NotFoundError("There is no such person in this organisation.")
            if connection.execute(people_in(self._actor, project.id).where(tables.users.c.id == row.id)).one_or_none():
                raise ConflictError("This person is in the project already.")
            _insert_membership(connection, self._actor, row.id, project.id, role)
            details = {"data": {"role": role}}
            record(connection, self._actor, "user.added", row.id, details, project_id=project.id)
            return require_person(connection, self._actor, row.id, project.id)

        return await self._database.write(work)

    async def change(self, user_id: str, role: Role, project_id: str | None = None) -> Person:
        """Give a person another role. Raises :class:`ConflictError` where nobody would own the organisation then."""

        def work(connection: Connection) -> Person:
            known = require_person(connection, self._actor, user_id, project_id)
            if project_id is None and role != "owner":
                self._keep_an_owner(connection, known)
            connection.execute(
                update(tables.memberships).where(*self._membership(known.id, project_id)).values(role=role)
            )
            details = {"changes_requested": {"role": role}}
            record(connection, self._actor, "user.updated", known.id, details, project_id=project_id)
            return require_person(connection, self._actor, known.id, project_id)

        return await self._database.write(work)

    async def remove(self, user_id: str, project_id: str | None = None) -> None:
        """Take a person out of a project, or out of the organisation with all of its projects.

        Their keys there no longer work. Raises :class:`ConflictError` where nobody would own the organisation then.
        """

        def work(connection: Connection) -> None:
            known = require_person(connection, self._actor, user_id, project_id)
            memberships = tables.memberships
            statement = delete(memberships).where(
                memberships.c.user_id == known.id, memberships.c.organisation_id == self._actor.organisation_id
            )
            if project_id is None:
                self._keep_an_owner(connection, known)
            else:
                statement = statement.where(memberships.c.project_id == storable(project_id))
            connection.execute(statement)
            record(connection, self._actor, "user.deleted", known.id, project_id=project_id)

        await self._database.write(work)

    def _keep_an_owner(self, connection: Connection, leaving: Person) -> None:
        owners = (
            select(func.count())
            .select_from(tables.memberships)
            .where(
                tables.memberships.c.organisation_id == self._actor.organisation_id,
                tables.memberships.c.project_id == "",
                tables.memberships.c.role == "owner",
            )
        )
        if leaving.role == "owner" and (connection.scalar(owners) or 0) < 2:
            raise ConflictError("The organisation needs an owner; make somebody else one first.")

    def _membership(self, user_id: str, project_id: str | None) -> tuple[Any, ...]:
        memberships = tables.memberships
        return (
            memberships.c.user_id == user_id,
            memberships.c.organisation_id == self._actor.organisation_id,
            memberships.c.project_id == storable(project_id or ""),
        )


class ServiceAccounts:
    """Accounts of one project that no person signs in to: they have keys and nothing else. As :class:`People`."""

    def __init__(self, database: Database, actor: Actor, project_id: str) -> None:
        authorize(actor, "administer")
        self._database = database
        self._actor = actor
        self._project_id = project_id

    async def page(self, *, limit: int = 20, after: str | None = None) -> Listing[Person]:
        """The newest first. Raises :class:`CursorError`."""
        query = people_in(self._actor, self._project_id).where(tables.users.c.kind == "service")

        def work(connection: Connection) -> Listing[Person]:
            require_project(connection, self._actor, self._project_id)
            found = page_of(connection, query, tables.users, limit=limit, after=after)
            return Listing([Person(*tuple(row)) for row in found.items], found.has_more)

        return await self._database.read(work)

    async def get(self, account_id: str) -> Person:
        """One account."""
        return await self._database.read(lambda connection: self._require(connection, account_id))

    async def create(self, name: str) -> Person:
        """A new account, a member of the project. Raises :class:`ConflictError` for an archived project."""

        def work(connection: Connection) -> Person:
            project = require_project(connection, self._actor, self._project_id, open=True)
            account_id = _insert_user(connection, "service", name, None)
            _insert_membership(connection, self._actor, account_id, project.id, "member")
            details = {"data": {"role": "member"}}
            record(connection, self._actor, "service_account.created", account_id, details, project_id=project.id)
            return self._require(connection, account_id)

        return await self._database.write(work)

    async def change(self, account_id: str, *, name: str | None = None, role: Role | None = None) -> Person:
        """Give it another name, another role or both."""

        def work(connection: Connection) -> Person:
            known = self._require(connection, account_id)
            memberships, users = tables.memberships, tables.users
            changes: dict[str, str] = {}
            if name is not None:
                changes["name"] = one_line(name)
                connection.execute(update(users).where(users.c.id == known.id).values(name=changes["name"]))
            if role is not None:
                changes["role"] = role
                connection.execute(
                    update(memberships)
                    .where(memberships.c.user_id == known.id, memberships.c.project_id == self._project_id)
                    .values(role=role)
                )
            details = {"changes_requested": changes}
            record(connection, self._actor, "service_account.updated", known.id, details, project_id=self._project_id)
            return self._require(connection, known.id)

        return await self._database.write(work)

    async def delete(self, account_id: str) -> None:
        """End it: its keys no longer work."""

        def work(connection: Connection) -> None:
            known = self._require(connection, account_id)
            memberships, keys = tables.memberships, tables.api_keys
            connection.execute(delete(memberships).where(memberships.c.user_id == known.id))
            connection.execute(
                update(keys).where(keys.c.user_id == known.id, keys.c.revoked_at.is_(None)).values(revoked_at=now_us())
            )
            record(connection, self._actor, "service_account.deleted", known.id, project_id=self._project_id)

        await self._database.write(work)

    def _require(self, connection: Connection, account_id: str) -> Person:
        require_project(connection, self._actor, self._project_id)
        query = people_in(self._actor, self._project_id).where(
            tables.users.c.id == storable(account_id), tables.users.c.kind == "service"
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("There is no such service account in this project.")
        return Person(*tuple(row))


def people_in(actor: Actor, project_id: str | None = None) -> Select[Any]:
    """A query of everybody in the organisation, or in a project of it."""
    users, memberships = tables.users, tables.memberships
    return (
        select(
            users.c.id,
            users.c.kind,
            users.c.email,
            users.c.name,
            users.c.created_at,
            users.c.claimed_at,
            memberships.c.role,
            memberships.c.created_at.label("added_at"),
        )
        .select_from(users)
        .join(memberships, memberships.c.user_id == users.c.id)
        .where(memberships.c.organisation_id == actor.organisation_id)
        .where(memberships.c.project_id == storable(project_id or ""))
    )


def require_person(connection: Connection, actor: Actor, user_id: str, project_id: str | None = None) -> Person:
    """A person of the organisation or project. Raises :class:`NotFoundError`."""
    if project_id is not None:
        require_project(connection, actor, project_id)
    query = people_in(actor, project_id).where(tables.users.c.id == storable(user_id), tables.users.c.kind == "person")
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no such person in this {'organisation' if project_id is None else 'project'}.")
    return Person(*tuple(row))


def _insert_user(connection: Connection, kind: str, name: str, email: str | None) -> str:
    users, user_id = tables.users, new_id("user" if kind == "person" else "svc_acct")
    if email is not None and connection.scalar(select(users.c.id).where(users.c.email == email)) is not None:
        raise ConflictError("Somebody has this address already.")
    connection.execute(
        insert(users).values(id=user_id, kind=kind, email=email, name=one_line(name), created_at=now_us())
    )
    return user_id


def _insert_membership(connection: Connection, actor: Actor, user_id: str, project_id: str, role: Role) -> None:
    connection.execute(
        insert(tables.memberships).values(
            user_id=user_id,
            organisation_id=actor.organisation_id,
            project_id=project_id,
            role=role,
            created_at=now_us(),
        )
    )


def _email(text: str) -> str:
    return one_line(text).lower()
