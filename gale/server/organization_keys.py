"""Keys over HTTP: administration keys, a project's keys, and its service accounts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gale.platform.api_keys import ApiKeys, NewKey
from gale.platform.identities import Identities
from gale.platform.people import ServiceAccounts
from gale.platform.store import Store
from gale.server.caller import actor_of
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, Limit, Order, listed
from gale.server.organization_schema import (
    KeyChange,
    NewAccountKey,
    NewAdminKey,
    NewProjectKey,
    NewServiceAccount,
    ServiceAccountChange,
    account_json,
    account_key_json,
    admin_key_json,
    deleted_json,
    project_key_json,
)


def add(router: APIRouter, store: Store, identities: Identities) -> None:
    """Add the routes to ``router``."""
    _admin_keys(router, store, identities)
    _project_keys(router, store, identities)
    _service_accounts(router, store, identities)


def _admin_keys(router: APIRouter, store: Store, identities: Identities) -> None:
    def keys(request: Request) -> ApiKeys:
        return store.api_keys(actor_of(request), None)

    @router.get("/admin_api_keys")
    async def list_admin_keys(
        request: Request, limit: Limit = 20, after: After = None, order: Order = "asc"
    ) -> dict[str, Any]:
        found = await keys(request).page(limit=limit, after=after, order=order)
        return listed([admin_key_json(each) for each in found.items], has_more=found.has_more)

    @router.post("/admin_api_keys", openapi_extra=request_schema(NewAdminKey))
    async def create_admin_key(request: Request) -> dict[str, Any]:
        mine, body = keys(request), await read_json(request, NewAdminKey)
        key, text = await mine.create(NewKey(body.name, expires_in_s=body.expires_in_seconds))
        identities.forget()
        return {**admin_key_json(key), "value": text}

    @router.get("/admin_api_keys/{key_id}")
    async def get_admin_key(key_id: str, request: Request) -> dict[str, Any]:
        return admin_key_json(await keys(request).get(key_id))

    @router.delete("/admin_api_keys/{key_id}")
    async def delete_admin_key(key_id: str, request: Request) -> dict[str, Any]:
        await keys(request).revoke(key_id)
        identities.forget()
        return deleted_json("organization.admin_api_key", key_id)


def _project_keys(router: APIRouter, store: Store, identities: Identities) -> None:
    def keys(request: Request, project_id: str) -> ApiKeys:
        return store.api_keys(actor_of(request), project_id)

    @router.get("/projects/{project_id}/api_keys")
    async def list_keys(project_id: str, request: Request, limit: Limit = 20, after: After = None) -> dict[str, Any]:
        found = await keys(request, project_id).page(limit=limit, after=after)
        return listed([project_key_json(each) for each in found.items], has_more=found.has_more)

    # Not OpenAI's, whose own page makes them.
    @router.post("/projects/{project_id}/api_keys", openapi_extra=request_schema(NewProjectKey))
    async def create_key(project_id: str, request: Request) -> dict[str, Any]:
        mine, body = keys(request, project_id), await read_json(request, NewProjectKey)
        key, text = await mine.create(_new_key(body), body.user_id)
        identities.forget()
        return {**project_key_json(key), "value": text}

    @router.get("/projects/{project_id}/api_keys/{key_id}")
    async def get_key(project_id: str, key_id: str, request: Request) -> dict[str, Any]:
        return project_key_json(await keys(request, project_id).get(key_id))

    @router.post("/projects/{project_id}/api_keys/{key_id}", openapi_extra=request_schema(KeyChange))
    async def change_key(project_id: str, key_id: str, request: Request) -> dict[str, Any]:
        mine, body = keys(request, project_id), await read_json(request, KeyChange)
        key = await mine.change(key_id, scopes=body.scopes, expires_in_s=body.expires_in_seconds)
        identities.forget()
        return project_key_json(key)

    @router.delete("/projects/{project_id}/api_keys/{key_id}")
    async def delete_key(project_id: str, key_id: str, request: Request) -> dict[str, Any]:
        await keys(request, project_id).revoke(key_id)
        identities.forget()
        return deleted_json("organization.project.api_key", key_id)


def _service_accounts(router: APIRouter, store: Store, identities: Identities) -> None:
    def accounts(request: Request, project_id: str) -> ServiceAccounts:
        return store.service_accounts(actor_of(request), project_id)

    @router.get("/projects/{project_id}/service_accounts")
    async def list_accounts(
        project_id: str, request: Request, limit: Limit = 20, after: After = None
    ) -> dict[str, Any]:
        found = await accounts(request, project_id).page(limit=limit, after=after)
        return listed([account_json(each) for each in found.items], has_more=found.has_more)

    @router.post("/projects/{project_id}/service_accounts", openapi_extra=request_schema(NewServiceAccount))
    async def create_account(project_id: str, request: Request) -> dict[str, Any]:
        mine, body = accounts(request, project_id), await read_json(request, NewServiceAccount)
        account = await mine.create(body.name)
        keys = store.api_keys(actor_of(request), project_id)
        key, text = await keys.create(NewKey("Secret key", expires_in_s=body.expires_in_seconds), account.id)
        identities.forget()
        return {**account_json(account), "api_key": account_key_json(key, text)}

    @router.get("/projects/{project_id}/service_accounts/{service_account_id}")
    async def get_account(project_id: str, service_account_id: str, request: Request) -> dict[str, Any]:
        return account_json(await accounts(request, project_id).get(service_account_id))

    @router.post(
        "/projects/{project_id}/service_accounts/{service_account_id}",
        openapi_extra=request_schema(ServiceAccountChange),
    )
    async def change_account(project_id: str, service_account_id: str, request: Request) -> dict[str, Any]:
        mine, body = accounts(request, project_id), await read_json(request, ServiceAccountChange)
        account = await mine.change(service_account_id, name=body.name, role=body.role)
        identities.forget()
        return account_json(account)

    @router.delete("/projects/{project_id}/service_accounts/{service_account_id}")
    async def delete_account(project_id: str, service_account_id: str, request: Request) -> dict[str, Any]:
        await accounts(request, project_id).delete(service_account_id)
        identities.forget()
        return deleted_json("organization.project.service_account", service_account_id)

    @router.post(
        "/projects/{project_id}/service_accounts/{service_account_id}/api_keys",
        openapi_extra=request_schema(NewAccountKey),
    )
    async def create_account_key(project_id: str, service_account_id: str, request: Request) -> dict[str, Any]:
        mine, body = accounts(request, project_id), await read_json(request, NewAccountKey)
        account = await mine.get(service_account_id)
        key, text = await store.api_keys(actor_of(request), project_id).create(_new_key(body), account.id)
        identities.forget()
        return account_key_json(key, text)


def _new_key(body: NewAccountKey) -> NewKey:
    return NewKey(body.name, body.scopes, body.models, body.expires_in_seconds)
