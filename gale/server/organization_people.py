"""People over HTTP: those of the organisation, and those of each project."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gale.platform.identities import Identities
from gale.platform.people import People
from gale.platform.store import Store
from gale.server.caller import actor_of
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, Limit, listed
from gale.server.organization_schema import (
    NewProjectUser,
    NewUser,
    UserChange,
    deleted_json,
    link_json,
    project_user_json,
    user_json,
)


def add(router: APIRouter, store: Store, identities: Identities) -> None:
    """Add the routes to ``router``."""

    def people(request: Request) -> People:
        return store.people(actor_of(request))

    @router.get("/users")
    async def list_users(
        request: Request,
        limit: Limit = 20,
        after: After = None,
        emails: Annotated[list[str], Query(alias="emails[]", max_length=100)] = [],  # noqa: B006 (FastAPI copies it)
    ) -> dict[str, Any]:
        found = await people(request).page(limit=limit, after=after, emails=emails)
        return listed([user_json(each) for each in found.items], has_more=found.has_more)

    # Not OpenAI's, which sends invitations by e-mail: whoever makes the account hands over the link.
    @router.post("/users", openapi_extra=request_schema(NewUser))
    async def create_user(request: Request) -> dict[str, Any]:
        mine, body = people(request), await read_json(request, NewUser)
        person = await mine.create(body.name, body.email, body.role)
        link = await store.sessions.link_for(actor_of(request), person.id)
        identities.forget()
        return {**user_json(person), "sign_in_link": link_json(link)}

    @router.post("/users/{user_id}/sign_in_links")
    async def create_link(user_id: str, request: Request) -> dict[str, Any]:
        return link_json(await store.sessions.link_for(actor_of(request), user_id))

    @router.get("/users/{user_id}")
    async def get_user(user_id: str, request: Request) -> dict[str, Any]:
        return user_json(await people(request).get(user_id))

    @router.post("/users/{user_id}", openapi_extra=request_schema(UserChange))
    async def change_user(user_id: str, request: Request) -> dict[str, Any]:
        mine, body = people(request), await read_json(request, UserChange)
        person = await mine.change(user_id, body.role)
        identities.forget()
        return user_json(person)

    @router.delete("/users/{user_id}")
    async def delete_user(user_id: str, request: Request) -> dict[str, Any]:
        await people(request).remove(user_id)
        identities.forget()
        return deleted_json("organization.user", user_id)

    @router.get("/projects/{project_id}/users")
    async def list_project_users(
        project_id: str, request: Request, limit: Limit = 20, after: After = None
    ) -> dict[str, Any]:
        found = await people(request).page(project_id, limit=limit, after=after)
        return listed([project_user_json(each) for each in found.items], has_more=found.has_more)

    @router.post("/projects/{project_id}/users", openapi_extra=request_schema(NewProjectUser))
    async def add_project_user(project_id: str, request: Request) -> dict[str, Any]:
        mine, body = people(request), await read_json(request, NewProjectUser)
        return project_user_json(await mine.add(project_id, body.role, user_id=body.user_id, email=body.email))

    @router.get("/projects/{project_id}/users/{user_id}")
    async def get_project_user(project_id: str, user_id: str, request: Request) -> dict[str, Any]:
        return project_user_json(await people(request).get(user_id, project_id))

    @router.post("/projects/{project_id}/users/{user_id}", openapi_extra=request_schema(UserChange))
    async def change_project_user(project_id: str, user_id: str, request: Request) -> dict[str, Any]:
        mine, body = people(request), await read_json(request, UserChange)
        person = await mine.change(user_id, body.role, project_id)
        identities.forget()
        return project_user_json(person)

    @router.delete("/projects/{project_id}/users/{user_id}")
    async def delete_project_user(project_id: str, user_id: str, request: Request) -> dict[str, Any]:
        await people(request).remove(user_id, project_id)
        identities.forget()
        return deleted_json("organization.project.user", user_id)
