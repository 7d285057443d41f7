"""An organisation and its projects, as its owners administer them.

Everything asked for by id is looked for in the actor's organisation only, so that another's looks like nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, insert, select, update

from gale.platform import tables
from gale.platform.access import Actor, authorize
from gale.platform.audit import record
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, NotFoundError
from gale.platform.ids import new_id
from gale.platform.jobs import cancel_paused
from gale.platform.listing import Listing, page_of
from gale.platform.text import one_line, storable
from gale.platform.tuning_bill import settle


@dataclass(frozen=True, slots=True)
class Organisation:
    """Who pays and owns. Times in microseconds since 1970, here and below."""

    id: str
    name: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Project:
    """A tenant of an organisation."""

    id: str
    name: str
    created_at: int
    archived_at: int | None


class Organisations:
    """All organisations of this Gale, for whoever has its shell; over HTTP nobody sees but their own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[Organisation]:
        """The oldest first."""
        table = tables.organisations
        query = select(table).order_by(table.c.created_at, table.c.id)
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [Organisation(*row) for row in rows]

    async def create(self, name: str) -> tuple[Organisation, Project]:
        """A new organisation with one project and nobody in it yet."""
        now = now_us()
        organisation = Organisation(new_id("org"), one_line(name), now)
        project = Project(new_id("proj"), "Default project", now, None)
        shell = Actor(organisation.id, None, None, None, "owner")

        def work(connection: Connection) -> None:
            connection.execute(
                insert(tables.organisations).values(id=organisation.id, name=organisation.name, created_at=now)
            )
            record(connection, shell, "organization.updated", organisation.id, {"changes_requested": {"title": name}})
            insert_project(connection, shell, project)

        await self._database.write(work)
        return organisation, project


class Projects:
    """The projects of the organisation that ``actor`` administers. Raises :class:`NotAllowedError` for others."""

    def __init__(self, database: Database, actor: Actor) -> None:
        authorize(actor, "administer")
        self._database = database
        self._actor = actor

    async def page(self, *, limit: int = 20, after: str | None = None, archived: bool = False) -> Listing[Project]:
        """The newest first; archived ones only if asked for. Raises :class:`CursorError`."""
        query = projects_of(self._actor)
        if not archived:
            query = query.where(tables.projects.c.archived_at.is_(None))
        found = await self._database.read(
            lambda connection: page_of(connection, query, tables.projects, limit=limit, after=after)
        )
        return Listing([Project(*tuple(row)) for row in found.items], found.has_more)

    async def create(self, name: str) -> Project:
        """A new project."""
        project = Project(new_id("proj"), one_line(name), now_us(), None)
        await self._database.write(lambda connection: insert_project(connection, self._actor, project))
        return project

    async def get(self, project_id: str) -> Project:
        """One project. Raises :class:`NotFoundError`."""
        return await self._database.read(lambda connection: require_project(connection, self._actor, project_id))

    async def rename(self, project_id: str, name: str) -> Project:
        """Give it another name. Raises :class:`NotFoundError`."""
        changes = {"name": one_line(name)}

        def work(connection: Connection) -> Project:
            project = require_project(connection, self._actor, project_id)
            self._update(connection, project.id, changes)
            details = {"changes_requested": changes}
            record(connection, self._actor, "project.updated", project.id, details, project_id=project.id)
            return require_project(connection, self._actor, project.id)

        return await self._database.write(work)

    async def archive(self, project_id: str) -> Project:
        """End its use for good: its keys no longer work, what it holds stays. Raises :class:`NotFoundError`.

        Raises :class:`ConflictError` for the project of a Gale without accounts, which has nobody else's to use.
        """
        if project_id == tables.DEFAULT_PROJECT:
            raise ConflictError("The default project cannot be archived.")

        def work(connection: Connection) -> Project:
            project = require_project(connection, self._actor, project_id)
            if project.archived_at is None:
                self._update(connection, project.id, {"archived_at": now_us()})
                record(connection, self._actor, "project.archived", project.id, project_id=project.id)
                # Nobody is left who could: what they hold of the organisation's budgets would be held for good.
                cancel_paused(connection, project.id, settle)
            return require_project(connection, self._actor, project.id)

        return await self._database.write(work)

    @staticmethod
    def _update(connection: Connection, project_id: str, values: dict[str, Any]) -> None:
        connection.execute(update(tables.projects).where(tables.projects.c.id == project_id).values(**values))


def projects_of(actor: Actor) -> Select[Any]:
    """A query of the organisation's projects."""
    table = tables.projects
    columns = (table.c.id, table.c.name, table.c.created_at, table.c.archived_at)
    return select(*columns).where(table.c.organisation_id == actor.organisation_id)


def require_project(connection: Connection, actor: Actor, project_id: str, *, open: bool = False) -> Project:
    """The project, which with ``open`` must not be archived. Raises :class:`NotFoundError`, :class:`ConflictError`."""
    query = projects_of(actor).where(tables.projects.c.id == storable(project_id))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError("There is no such project.")
    project = Project(*tuple(row))
    if open and project.archived_at is not None:
        raise ConflictError("This project is archived.")
    return project


def insert_project(connection: Connection, actor: Actor, project: Project) -> None:
    """Write a new project of the actor's organisation."""
    connection.execute(
        insert(tables.projects).values(
            id=project.id,
            organisation_id=actor.organisation_id,
            name=project.name,
            created_at=project.created_at,
            archived_at=None,
        )
    )
    details = {"data": {"name": project.name, "title": project.name}}
    record(connection, actor, "project.created", project.id, details, project_id=project.id)
