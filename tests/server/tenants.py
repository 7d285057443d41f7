"""Two organisations on one server, each with one of everything that has an id.

Whoever adds a route with an id adds the making of such a thing to ``MAKERS``, and a body to ``BODIES`` where the route
needs one: the matrix of routes and tenants fails until then.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from gale.platform import tables
from gale.platform.access import LOCAL_OWNER, Actor
from gale.platform.api_keys import NewKey
from gale.platform.fine_tuning import Asked
from gale.platform.store import Store
from tests.server.live import Live


@dataclass
class Tenant:
    """An organisation with its keys, and the ids of its things by the names that routes have for them."""

    http: httpx2.Client
    store: Store
    actor: Actor
    key: str
    admin_key: str
    ids: dict[str, str] = field(default_factory=dict)

    def send(self, method: str, path: str, **more: Any) -> httpx2.Response:
        """A request with the key that may most at this path."""
        key = self.admin_key if path.startswith("/v1/organization") else self.key
        return self.http.request(method, path, headers={"authorization": f"Bearer {key}"}, **more)

    def make(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a POST that succeeds answers with."""
        response = self.send("POST", path, json=body)
        assert response.is_success, f"{path}: {response.text}"
        made: dict[str, Any] = response.json()
        return made


def _project(tenant: Tenant) -> None:
    listed = tenant.send("GET", "/v1/organization/projects").json()["data"]
    tenant.ids["project_id"] = listed[-1]["id"]


def _people(tenant: Tenant) -> None:
    body = {"name": "Kim", "email": f"kim@{tenant.actor.organisation_id.lower()}.example"}
    user = tenant.make("/v1/organization/users", body)["id"]
    tenant.make(f"/v1/organization/projects/{tenant.ids['project_id']}/users", {"user_id": user, "role": "member"})
    tenant.ids["user_id"] = user


def _keys(tenant: Tenant) -> None:
    project = f"/v1/organization/projects/{tenant.ids['project_id']}"
    tenant.ids["service_account_id"] = tenant.make(f"{project}/service_accounts", {"name": "robot"})["id"]
    tenant.ids["api_key_id"] = tenant.make(f"{project}/api_keys", {"name": "k"})["id"]
    tenant.ids["key_id"] = tenant.make("/v1/organization/admin_api_keys", {"name": "a"})["id"]


def _page(tenant: Tenant) -> None:
    tenant.ids["page conversation_id"] = tenant.make("/api/conversations", {})["id"]


def _responses(tenant: Tenant) -> None:
    message = {"type": "message", "role": "user", "content": "Hello"}
    tenant.ids["conversation_id"] = tenant.make("/v1/conversations", {"items": [message]})["id"]
    listed = tenant.send("GET", f"/v1/conversations/{tenant.ids['conversation_id']}/items").json()
    tenant.ids["item_id"] = listed["data"][0]["id"]
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 16}
    tenant.ids["response_id"] = tenant.make("/v1/responses", body)["id"]


def _files(tenant: Tenant) -> None:
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    uploaded = tenant.send("POST", "/v1/files", files={"file": ("a.jsonl", row)}, data={"purpose": "fine-tune"})
    tenant.ids["file_id"] = uploaded.json()["id"]
    body = {"filename": "b.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "text/jsonl"}
    tenant.ids["upload_id"] = tenant.make("/v1/uploads", body)["id"]


def _jobs(tenant: Tenant) -> None:
    # Past the route, which wants a model that can be trained.
    asked = Asked("tiny", "tiny", "/", None, tenant.ids["file_id"], None, "supervised", {}, None, 1, None, {})
    tenant.ids["job_id"] = asyncio.run(tenant.store.fine_tuning(tenant.actor).create(asked)).id


def _batches(tenant: Tenant) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
    file = tenant.send("POST", "/v1/files", files={"file": ("c.jsonl", line)}, data={"purpose": "batch"}).json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    tenant.ids["batch_id"] = tenant.make("/v1/batches", asked)["id"]


def _budgets(tenant: Tenant) -> None:
    budget = {"scope": "project", "scope_id": tenant.ids["project_id"], "period": "total", "limit_micro": 10**12}
    tenant.ids["budget_id"] = tenant.make("/v1/organization/budgets", budget)["id"]
    # A limit has no id of its own: the project's, and what it is for.
    tenant.ids["rate_limit_id"] = "rl-*"


MAKERS: list[Callable[[Tenant], None]] = [
    _project,
    _people,
    _keys,
    _page,
    _responses,
    _files,
    _jobs,
    _batches,
    _budgets,
]

# Routes whose parameter of the same name means another kind of thing.
NAMES: dict[tuple[str, str], str] = {
    ("/api/conversations/{conversation_id}", "conversation_id"): "page conversation_id",
    ("/api/conversations/{conversation_id}/turns", "conversation_id"): "page conversation_id",
}

# What a request needs besides an id, so that it is the id alone that it can fail for.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/organization/projects/{project_id}"): {"name": "renamed"},
    ("POST", "/v1/organization/projects/{project_id}/archive"): {},
    ("POST", "/v1/organization/projects/{project_id}/api_keys"): {"name": "k"},
    ("POST", "/v1/organization/projects/{project_id}/api_keys/{api_key_id}"): {"scopes": ["use"]},
    ("POST", "/v1/organization/projects/{project_id}/service_accounts"): {"name": "s"},
    ("POST", "/v1/organization/projects/{project_id}/service_accounts/{service_account_id}"): {"name": "t"},
    ("POST", "/v1/organization/projects/{project_id}/service_accounts/{service_account_id}/api_keys"): {},
    ("POST", "/v1/organization/projects/{project_id}/users"): {"user_id": "user_first", "role": "member"},
    ("POST", "/v1/organization/projects/{project_id}/users/{user_id}"): {"role": "reader"},
    ("POST", "/v1/organization/users/{user_id}"): {"role": "reader"},
    ("POST", "/v1/organization/users/{user_id}/sign_in_links"): {},
    ("PATCH", "/api/conversations/{conversation_id}"): {"title": "renamed"},
    ("POST", "/api/conversations/{conversation_id}/turns"): {"content": "hello"},
    ("POST", "/v1/conversations/{conversation_id}"): {"metadata": {"a": "b"}},
    ("POST", "/v1/conversations/{conversation_id}/items"): {
        "items": [{"type": "message", "role": "user", "content": "x"}]
    },
    ("POST", "/v1/organization/projects/{project_id}/rate_limits/{rate_limit_id:path}"): {
        "max_requests_per_1_minute": 900
    },
    ("POST", "/v1/responses/{response_id}/cancel"): {},
    ("POST", "/v1/batches/{batch_id}/cancel"): {},
    ("POST", "/v1/uploads/{upload_id}/complete"): {"part_ids": ["part_x"]},
    ("POST", "/v1/uploads/{upload_id}/cancel"): {},
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): {},
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): {},
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): {},
}

# Routes that take a form with a file.
FORMS = {("POST", "/v1/uploads/{upload_id}/parts"): {"data": ("part", b"x")}}

# What is looked at by its id only, where it was made.
UNLISTED = {"upload_id", "rate_limit_id"}

# Ids that are the same for everybody, since they say something only below another one.
COMMON = {"rate_limit_id"}

# Ids that name nobody's things: the model, which all may use, and pages of the browser.
SHARED = {"/v1/models/{model_id:path}", "/c/{conversation_id}"}


def every_route(live: Live) -> list[Route | APIRoute]:
    """The routes of the application, wherever they were added."""
    found: list[Route | APIRoute] = []
    for route in live.app.routes:
        if isinstance(route, Mount):
            assert route.path == "/assets", "a mounted application must be checked as well"
        elif isinstance(route, Route | APIRoute):
            found.append(route)
        else:
            assert type(route).__name__ == "_IncludedRouter", route
            found += route.original_router.routes  # type: ignore[attr-defined]
    return found


def parameters_of(path: str) -> list[str]:
    """The names of the ids in a path, as ``Tenant.ids`` has them."""
    return [NAMES.get((path, name), name) for name in re.findall(r"{(\w+)(?::\w+)?}", path)]


def filled(path: str, ids: list[str]) -> str:
    """``path`` with ids in its places."""
    places = iter(ids)
    return re.sub(r"{[^}]*}", lambda _: next(places), path)


def two_tenants(live: Live, store: Store) -> tuple[Tenant, Tenant]:
    """The default organisation and another, each with one of everything."""
    made, project = asyncio.run(store.organisations.create("Other"))
    shell = Actor(made.id, None, None, None, "owner")
    boss = asyncio.run(store.people(shell).create("Boss", "boss@other.example", "owner"))
    tenants = (
        _tenant(live, store, LOCAL_OWNER, tables.DEFAULT_PROJECT),
        _tenant(live, store, Actor(made.id, project.id, boss.id, None, "owner"), project.id),
    )
    for tenant in tenants:
        for make in MAKERS:
            make(tenant)
    return tenants


def _tenant(live: Live, store: Store, owner: Actor, project_id: str) -> Tenant:
    _, key = asyncio.run(store.api_keys(owner, project_id).create(NewKey("program")))
    _, admin_key = asyncio.run(store.api_keys(owner, None).create(NewKey("administration")))
    return Tenant(live.http, store, owner, key, admin_key)
