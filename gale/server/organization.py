"""``/v1/organization``: what its owners administer, in OpenAI's shapes. Another organisation's things are 404."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from gale.platform.audit import AuditFilter
from gale.platform.identities import Identities
from gale.platform.organisations import Projects
from gale.platform.store import Store
from gale.server import organization_keys, organization_people
from gale.server.caller import actor_of
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, Limit, listed
from gale.server.organization_schema import (
    NewProject,
    ProjectChange,
    audit_json,
    only_known_query,
    project_json,
)

_Second = Annotated[int | None, Query(ge=0, le=253_402_300_799)]
_Some = Annotated[list[str], Query(max_length=100)]


def routes(store: Store, identities: Identities) -> APIRouter:
    """All of them; ``identities`` is told of what must be obeyed at once."""
    router = APIRouter(prefix="/v1/organization", tags=["organization"], dependencies=[Depends(only_known_query)])
    _projects(router, store, identities)
    _audit_logs(router, store)
    organization_keys.add(router, store, identities)
    organization_people.add(router, store, identities)
    return router


def _projects(router: APIRouter, store: Store, identities: Identities) -> None:
    def projects(request: Request) -> Projects:
        return store.projects(actor_of(request))

    @router.get("/projects")
    async def list_projects(
        request: Request, limit: Limit = 20, after: After = None, include_archived: bool = False
    ) -> dict[str, Any]:
        found = await projects(request).page(limit=limit, after=after, archived=include_archived)
        return listed([project_json(each) for each in found.items], has_more=found.has_more)

    @router.post("/projects", openapi_extra=request_schema(NewProject))
    async def create_project(request: Request) -> dict[str, Any]:
        mine = projects(request)
        return project_json(await mine.create((await read_json(request, NewProject)).name))

    @router.get("/projects/{project_id}")
    async def get_project(project_id: str, request: Request) -> dict[str, Any]:
        return project_json(await projects(request).get(project_id))

    @router.post("/projects/{project_id}", openapi_extra=request_schema(ProjectChange))
    async def change_project(project_id: str, request: Request) -> dict[str, Any]:
        mine, body = projects(request), await read_json(request, ProjectChange)
        if body.name is None:
            return project_json(await mine.get(project_id))
        return project_json(await mine.rename(project_id, body.name))

    @router.post("/projects/{project_id}/archive")
    async def archive_project(project_id: str, request: Request) -> dict[str, Any]:
        project = await projects(request).archive(project_id)
        identities.forget()
        return project_json(project)


def _audit_logs(router: APIRouter, store: Store) -> None:
    @router.get("/audit_logs")
    async def list_audit_logs(
        request: Request,
        limit: Limit = 20,
        after: After = None,
        gt: Annotated[_Second, Query(alias="effective_at[gt]")] = None,
        gte: Annotated[_Second, Query(alias="effective_at[gte]")] = None,
        lt: Annotated[_Second, Query(alias="effective_at[lt]")] = None,
        lte: Annotated[_Second, Query(alias="effective_at[lte]")] = None,
        project_ids: Annotated[_Some, Query(alias="project_ids[]")] = [],  # noqa: B006 (FastAPI copies it)
        event_types: Annotated[_Some, Query(alias="event_types[]")] = [],  # noqa: B006
        actor_ids: Annotated[_Some, Query(alias="actor_ids[]")] = [],  # noqa: B006
        actor_emails: Annotated[_Some, Query(alias="actor_emails[]")] = [],  # noqa: B006
        resource_ids: Annotated[_Some, Query(alias="resource_ids[]")] = [],  # noqa: B006
    ) -> dict[str, Any]:
        # An event belongs to the second that it is shown with.
        begins = [second for second in (gte, None if gt is None else gt + 1) if second is not None]
        ends = [second for second in (lt, None if lte is None else lte + 1) if second is not None]
        wanted = AuditFilter(
            after_us=max(begins) * 1_000_000 if begins else None,
            before_us=min(ends) * 1_000_000 if ends else None,
            types=event_types,
            project_ids=project_ids,
            actor_ids=actor_ids,
            actor_emails=actor_emails,
            resource_ids=resource_ids,
        )
        found = await store.audit_log(actor_of(request)).page(wanted, limit=limit, after=after)
        return listed([audit_json(each) for each in found.items], has_more=found.has_more)
