"""``/v1/organization`` through the official client; signing in to the page; and that no key is ever written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import structlog
from openai import OpenAI

from gale.platform import tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.api_keys import NewKey
from gale.platform.database import Database
from gale.platform.file_folder import FileFolder
from gale.platform.secret import Secret
from gale.platform.store import Store
from gale.server.origins import Origins
from tests.server.live import Live, start

CHAT: dict[str, Any] = {"model": "scripted/one", "messages": [{"role": "user", "content": "one two"}]}


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Live]:
    """A server that nobody has used yet."""
    database = Database.open(f"sqlite:///{tmp_path / 'gale.db'}")
    store = Store(database, secret=Secret(b"f" * 32), folder=FileFolder(tmp_path / "files"))
    server = start(store, origins=Origins(own="https://gale.example"))
    yield server
    server.stop()
    store.close()


@pytest.fixture
def admin(fresh: Live) -> OpenAI:
    """The official client with an administration key."""
    _, key = asyncio.run(fresh.store.api_keys(LOCAL_OWNER, None).create(NewKey("admin")))
    return OpenAI(base_url=f"{fresh.url}/v1", api_key="none", admin_api_key=key, max_retries=0)


def with_key(live: Live, key: str) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


def test_a_project_its_accounts_and_their_keys(fresh: Live, admin: OpenAI) -> None:
    projects = admin.admin.organization.projects
    project = projects.create(name="Translations")
    assert (project.object, project.status) == ("organization.project", "active")
    assert projects.update(project.id, name="Letters").name == "Letters"
    assert [each.name for each in projects.list()] == ["Letters", "Default project"]

    account = projects.service_accounts.create(project.id, name="robot")
    assert account.role == "member"
    assert account.api_key is not None
    used = with_key(fresh, account.api_key.value)
    assert used.chat.completions.create(**CHAT).choices[0].message.content == "one two"
    with pytest.raises(openai.PermissionDeniedError):
        used.get("/organization/projects", cast_to=object)

    (key,) = projects.api_keys.list(project.id)
    assert key.redacted_value[:8] == account.api_key.value[:8]
    assert key.redacted_value[-4:] == account.api_key.value[-4:]
    assert account.api_key.value not in key.to_json()
    assert key.owner.service_account is not None
    assert key.owner.service_account.id == account.id
    second = projects.service_accounts.api_keys.create(account.id, project_id=project.id, scopes=["read"])
    with pytest.raises(openai.PermissionDeniedError):
        with_key(fresh, second.value).chat.completions.create(**CHAT)
    assert projects.api_keys.delete(second.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError):
        with_key(fresh, second.value).models.list()

    assert projects.service_accounts.delete(account.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError):
        used.models.list()
    assert projects.archive(project.id).status == "archived"
    assert [each.id for each in projects.list()] == [tables.DEFAULT_PROJECT]
    assert len(list(projects.list(include_archived=True))) == 2


def test_a_key_that_may_use_some_models_sees_no_other(fresh: Live, admin: OpenAI) -> None:
    path = f"/organization/projects/{tables.DEFAULT_PROJECT}/api_keys"
    headers = {"authorization": f"Bearer {admin.admin_api_key}"}
    made = fresh.http.post(f"/v1{path}", json={"name": "k", "models": ["another"]}, headers=headers).json()
    assert made["models"] == ["another"]
    client = with_key(fresh, made["value"])
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**CHAT)
    assert caught.value.code == "model_not_found"
    assert client.models.list().data == []
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gale-moderation")
    made = fresh.http.post(f"/v1{path}", json={"name": "m", "models": ["gale-moderation"]}, headers=headers).json()
    judging = with_key(fresh, made["value"])
    assert [model.id for model in judging.models.list()] == ["gale-moderation"]


def test_people_come_with_a_link_and_go(fresh: Live, admin: OpenAI) -> None:
    headers = {"authorization": f"Bearer {admin.admin_api_key}"}
    new = {"name": "Ann", "email": "ann@example.com", "role": "member"}
    made = fresh.http.post("/v1/organization/users", json=new, headers=headers).json()
    organization = admin.admin.organization
    assert [user.name for user in organization.users.list()] == ["Ann", "Owner"]
    assert [user.id for user in organization.users.list(emails=["ANN@example.com"])] == [made["id"]]
    added = organization.projects.users.create(tables.DEFAULT_PROJECT, user_id=made["id"], role="member")
    assert added.object == "organization.project.user"

    with httpx2.Client(base_url=fresh.url) as browser:
        assert browser.get("/api/info").status_code == 401
        assert browser.post("/api/sign-in", json={"token": made["sign_in_link"]["token"]}).status_code == 204
        # Set for https only, as this server is told that people reach it by https; sent by hand.
        cookie = {"cookie": f"gale_session={browser.cookies['gale_session']}"}
    assert fresh.http.get("/api/info", headers=cookie).json()["signed_in"] is True
    assert fresh.http.get("/v1/models", headers=cookie).status_code == 401, "the API takes no cookie"
    assert organization.users.delete(made["id"]).deleted
    assert fresh.http.get("/api/info", headers=cookie).status_code == 401
    with pytest.raises(openai.ConflictError):
        organization.users.delete(tables.FIRST_USER)


def test_what_was_done_is_in_the_audit_log(admin: OpenAI) -> None:
    organization = admin.admin.organization
    project = organization.projects.create(name="p")
    organization.admin_api_keys.create(name="second")
    organization.projects.archive(project.id)
    events = list(organization.audit_logs.list(limit=1))
    assert [event.type for event in events] == [
        "project.archived", "api_key.created", "project.created", "api_key.created",
    ]  # fmt: skip
    archived = events[0]
    assert archived.project_archived is not None
    assert archived.project_archived.id == project.id
    assert archived.actor is not None
    assert archived.actor.type == "api_key"
    now = int(time.time())
    logs = organization.audit_logs
    assert list(logs.list(effective_at={"gt": now + 5})) == []
    assert len(list(logs.list(effective_at={"gte": now - 3600, "lte": now + 5}))) == 4
    created = logs.list(event_types=["project.created", "user.added"], project_ids=[project.id])
    assert [event.type for event in created] == ["project.created"]


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/projects", {"name": "p", "role": "owner"}, "role"),
        ("POST", "/projects", {"name": "p", "organisation_id": "org_x"}, "organisation_id"),
        ("POST", "/projects", {"name": " "}, "name"),
        ("POST", "/projects", {"geography": None}, "name"),
        ("POST", "/users/user_first", {"role": "god"}, "role"),
        ("POST", "/users/user_first", {"role": "owner", "claimed_at": 1}, "claimed_at"),
        ("POST", "/users", {"name": "n", "email": "no address"}, "email"),
        ("POST", "/admin_api_keys", {"name": "k", "expires_in_seconds": 0}, "expires_in_seconds"),
        ("POST", "/admin_api_keys", {"name": "k", "digest": "00"}, "digest"),
        ("POST", "/projects/proj_default/api_keys", {"name": "k", "scopes": ["everything"]}, "scopes[0]"),
        ("GET", "/projects?archived=true", None, "archived"),
        ("GET", "/audit_logs?before=x", None, "before"),
        ("GET", "/audit_logs?effective_at[gt]=soon", None, "effective_at[gt]"),
        ("GET", "/users?limit=0", None, "limit"),
        ("GET", "/projects?after=proj_none", None, "after"),
    ],
)
def test_what_is_not_asked_for_by_name_is_refused_by_name(
    fresh: Live, admin: OpenAI, method: str, path: str, body: Any, param: str
) -> None:
    headers = {"authorization": f"Bearer {admin.admin_api_key}"}
    response = fresh.http.request(method, f"/v1/organization{path}", json=body, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_without_accounts_this_machine_administers_and_its_first_key_ends_that(fresh: Live) -> None:
    assert fresh.http.get("/v1/organization/projects").status_code == 200
    made = fresh.http.post(f"/v1/organization/projects/{tables.DEFAULT_PROJECT}/api_keys", json={"name": "first"})
    assert made.status_code == 200
    assert fresh.http.get("/v1/models").status_code == 401
    headers = {"authorization": f"Bearer {made.json()['value']}"}
    assert fresh.http.get("/v1/models", headers=headers).status_code == 200
    assert fresh.http.get("/v1/organization/projects", headers=headers).status_code == 403


def test_the_owner_s_link_makes_the_page_theirs(fresh: Live) -> None:
    link = asyncio.run(fresh.store.sessions.owner_link())
    assert link is not None
    conversation = fresh.http.post("/api/conversations", json={}).json()["id"]
    assert fresh.http.get("/api/info").json()["signed_in"] is False
    wrong = fresh.http.post("/api/sign-in", json={"token": "x" * 43})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_sign_in")
    assert fresh.http.get("/api/info").status_code == 200, "who does not open the link goes on as before"

    done = fresh.http.post("/api/sign-in", json={"token": link.token}, headers={"origin": fresh.url})
    cookie = done.headers["set-cookie"]
    for word in ("HttpOnly", "SameSite=strict", "Path=/api", "Secure", "Max-Age=2592000"):
        assert word in cookie
    assert fresh.http.post("/api/sign-in", json={"token": link.token}).status_code == 401
    assert fresh.http.get("/api/info", headers={"cookie": ""}).status_code == 401
    mine = {"cookie": cookie.partition(";")[0]}
    assert fresh.http.get("/api/info", headers=mine).json()["signed_in"] is True
    listed = fresh.http.get("/api/conversations", headers=mine).json()["conversations"]
    assert [each["id"] for each in listed] == [conversation], "what was there before is the owner's"

    for page in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        assert fresh.http.post("/api/conversations", json={}, headers={**mine, **page}).status_code == 403
        assert fresh.http.post("/api/sign-in", json={"token": "x"}, headers=page).status_code == 403
    for page in ({"origin": "https://gale.example"}, {"sec-fetch-site": "same-origin"}, {"origin": fresh.url}):
        assert fresh.http.post("/api/conversations", json={}, headers={**mine, **page}).status_code == 201

    assert fresh.http.post("/api/sign-out", headers=mine).status_code == 204
    assert fresh.http.get("/api/info", headers=mine).status_code == 401


def test_failed_sign_ins_are_recorded_but_do_not_fill_the_disk(fresh: Live) -> None:
    for _ in range(30):
        assert fresh.http.post("/api/sign-in", json={"token": "guess"}).status_code == 401
    events = fresh.http.get("/v1/organization/audit_logs", params={"limit": 100}).json()["data"]
    assert {event["type"] for event in events} == {"login.failed"}
    assert 1 <= len(events) <= 20


def test_the_canary_key_stands_nowhere(fresh: Live, admin: OpenAI, tmp_path: Path) -> None:
    project = f"/v1/organization/projects/{tables.DEFAULT_PROJECT}"
    admins = {"authorization": f"Bearer {admin.admin_api_key}"}
    key = fresh.http.post(f"{project}/api_keys", json={"name": "canary"}, headers=admins).json()["value"]
    lines: list[str] = []

    def note(_: object, __: str, event: dict[str, Any]) -> str:
        lines.append(repr(event))
        raise structlog.DropEvent

    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[note])
    try:
        mine = {"authorization": f"Bearer {key}"}
        answers = [
            fresh.http.post("/v1/chat/completions", json=CHAT, headers=mine),
            fresh.http.post("/v1/chat/completions", content=b"{", headers=mine),
            fresh.http.get("/nothing", headers=mine),
            fresh.http.get("/v1/models", headers={"authorization": f"Bearer {key[:-1]}"}),
            fresh.http.get("/v1/models", headers={**mine, "x-api-key": admin.admin_api_key or ""}),
            fresh.http.get("/v1/models", params={"api_key": key}, headers=mine),
            fresh.http.get(f"{project}/api_keys", headers=admins),
        ]
    finally:
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[])
    asyncio.run(fresh.store.database.read(lambda connection: connection.exec_driver_sql("SELECT 1") and None))
    fresh.stop()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(lines) >= len(answers)
    assert b"canary" in kept
    for secret in (key, admin.admin_api_key or ""):
        core = secret[14:-6]
        assert core.encode() not in kept
        assert core not in "\n".join(lines)
        assert all(core not in answer.text for answer in answers)
