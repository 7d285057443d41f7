"""Nothing of one tenant is seen, changed or deleted by another: every route, with every id that is not one's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from gale.engine.local import LocalEngine
from gale.model.transformer import Decoder
from gale.platform.database import Database
from gale.platform.file_folder import FileFolder
from gale.platform.secret import Secret
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.server.live import Live, start
from tests.server.tenants import (
    BODIES,
    COMMON,
    FORMS,
    SHARED,
    UNLISTED,
    Tenant,
    every_route,
    filled,
    parameters_of,
    two_tenants,
)

Both = tuple[Live, Tenant, Tenant]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, model: Decoder, tokenizer: Tokenizer) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("tenants")
    database = Database.open(f"sqlite:///{folder / 'gale.db'}")
    store = Store(database, secret=Secret(b"t" * 32), folder=FileFolder(folder / "files"))
    engine = LocalEngine(model, tokenizer, model_id="tiny")
    live = start(store, engine=engine)
    yield live, *two_tenants(live, store)
    live.stop()
    asyncio.run(engine.close())
    store.close()


def routes_with_ids(live: Live) -> Iterator[tuple[str, str]]:
    for route in every_route(live):
        if parameters_of(route.path) and route.path not in SHARED:
            for method in sorted(route.methods or ()):
                if method != "HEAD":
                    yield method, route.path


def test_every_route_with_an_id_is_covered(both: Both) -> None:
    live, mine, other = both
    for method, path in routes_with_ids(live):
        for name in parameters_of(path):
            assert name in mine.ids, f"tests/server/tenants.py: make a {name!r} for {path}"
            assert name in COMMON or mine.ids[name] != other.ids[name]
        if method in ("POST", "PATCH", "PUT"):
            assert (method, path) in BODIES or (method, path) in FORMS, (
                f"tests/server/tenants.py: give {method} {path} a body"
            )


def test_what_belongs_to_another_is_not_there(both: Both) -> None:
    live, mine, other = both
    tried = 0
    for method, path in routes_with_ids(live):
        names = parameters_of(path)
        # Every way in which at least one id is the other's: alone, and below something of one's own.
        for whose in range(1, 2 ** len(names)):
            if all(name in COMMON for place, name in enumerate(names) if whose >> place & 1):
                continue
            ids = [(other if whose >> place & 1 else mine).ids[name] for place, name in enumerate(names)]
            body = {"files": FORMS[method, path]} if (method, path) in FORMS else {"json": BODIES.get((method, path))}
            response = mine.send(method, filled(path, ids), **body)
            assert response.status_code == 404, f"{method} {filled(path, ids)}: {response.status_code} {response.text}"
            tried += 1
    assert tried > 40
    for name, id in other.ids.items():
        assert id in everything(other) or name in UNLISTED, f"the other's {name} is still there"


def test_lists_have_only_one_s_own(both: Both) -> None:
    _, mine, other = both
    seen = everything(mine)
    for name, id in other.ids.items():
        assert name in COMMON or id not in seen, f"the other's {name} is listed"
        assert mine.ids[name] in seen or name in UNLISTED
    for secret in (other.key, other.admin_key, mine.key, mine.admin_key):
        assert secret not in seen


def everything(tenant: Tenant) -> str:
    """All that its owner can list, and the things by their ids."""
    project, ids = f"/v1/organization/projects/{tenant.ids['project_id']}", tenant.ids
    paths = [
        "/api/conversations",
        f"/v1/conversations/{ids['conversation_id']}/items", f"/v1/responses/{ids['response_id']}",
        f"/v1/conversations/{ids['conversation_id']}", "/v1/organization/projects", "/v1/organization/users",
        "/v1/organization/admin_api_keys", "/v1/organization/audit_logs?limit=100", "/v1/files", "/v1/fine_tuning/jobs",
        f"/v1/fine_tuning/jobs/{ids['job_id']}/events", f"{project}/api_keys", "/v1/batches",
        "/v1/organization/budgets",
        f"{project}/service_accounts", f"{project}/users",
    ]  # fmt: skip
    answers = [tenant.send("GET", path) for path in paths]
    assert all(answer.status_code == 200 for answer in answers)
    return "\n".join(answer.text for answer in answers)


def test_a_cursor_of_another_s_is_no_place_to_go_on_from(both: Both) -> None:
    _, mine, other = both
    for path, name in (("projects", "project_id"), ("users", "user_id"), ("admin_api_keys", "key_id")):
        response = mine.send("GET", f"/v1/organization/{path}", params={"after": other.ids[name]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "after")


def test_an_object_of_another_s_in_a_body_is_not_found(both: Both) -> None:
    _, mine, other = both
    project = f"/v1/organization/projects/{mine.ids['project_id']}"
    assert (
        mine.send("POST", f"{project}/users", json={"user_id": other.ids["user_id"], "role": "member"}).status_code
        == 404
    )
    assert (
        mine.send("POST", f"{project}/api_keys", json={"name": "k", "user_id": other.ids["user_id"]}).status_code == 404
    )
    body = {"model": "tiny", "input": "x", "max_output_tokens": 16}
    for name in ("conversation", "previous_response_id"):
        id = other.ids["conversation_id" if name == "conversation" else "response_id"]
        assert mine.send("POST", "/v1/responses", json={**body, name: id}).status_code in (400, 404)


def test_a_project_s_key_administers_nothing_and_an_administration_key_uses_nothing(both: Both) -> None:
    live, mine, _ = both
    for route in every_route(live):
        for method in sorted((route.methods or set()) - {"HEAD"}):
            path = filled(route.path, [mine.ids.get(name, "x") for name in parameters_of(route.path)])
            if route.path.startswith("/v1/organization"):
                headers = {"authorization": f"Bearer {mine.key}"}
                body = {"scope": "project", "scope_id": mine.ids["project_id"], "period": "day", "limit_micro": 1}
                times = {"start_time": "1"} if "/usage/" in path or path.endswith("/costs") else {}
                sent = {"json": BODIES.get((method, route.path), body), "params": times}
                response = live.http.request(method, path, headers=headers, **sent)
                assert response.status_code == 403, f"{method} {path}: {response.status_code}"
    response = live.http.get("/api/conversations", headers={"authorization": f"Bearer {mine.admin_key}"})
    assert response.status_code == 403
