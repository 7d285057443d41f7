"""With accounts, nobody is served who has not said who they are; without, only this machine is."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from structlog.testing import capture_logs

from gale.core.errors import StoreError
from gale.platform import recent, tables
from gale.platform.access import LOCAL_OWNER
from gale.platform.api_keys import NewKey
from gale.platform.database import Database
from gale.platform.file_folder import FileFolder
from gale.platform.secret import Secret
from gale.platform.store import Store
from gale.server import background, caller
from gale.server.origins import Origins
from tests.server.live import Live, start
from tests.server.tenants import every_route

CHAT = {"model": "scripted/one", "messages": [{"role": "user", "content": "one two"}]}


@pytest.fixture(scope="module")
def keyed_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("keyed")
    store = open_store(folder)
    yield store
    store.close()


@pytest.fixture(scope="module")
def key(keyed_store: Store) -> str:
    return new_key(keyed_store)[1]


@pytest.fixture(scope="module")
def keyed(keyed_store: Store, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with accounts, a page, and one other page that may use it."""
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").write_text("<title>Gale</title>")
    (page / "theme.js").write_text("1")
    (page / "assets").mkdir()
    (page / "assets" / "a-1.js").write_text("2")
    server = start(keyed_store, static=page, origins=Origins(["https://app.example"], "https://gale.example"))
    yield server
    server.stop()


def open_store(folder: Path) -> Store:
    database = Database.open(f"sqlite:///{folder / 'gale.db'}")
    return Store(database, secret=Secret(b"k" * 32), folder=FileFolder(folder / "files"))


def new_key(store: Store, **more: object) -> tuple[str, str]:
    made, text = asyncio.run(store.api_keys(LOCAL_OWNER, tables.DEFAULT_PROJECT).create(NewKey("k", **more)))  # type: ignore[arg-type]
    return made.id, text


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def refused(response: httpx2.Response) -> bool:
    if response.status_code != 401:
        return False
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    return True


OPEN = {"/healthz", "/readyz", "/metrics", "/", "/c/{conversation_id}", "/theme.js", "/api/sign-in"}


def test_every_route_asks_for_a_key_but_those_that_are_meant_to_be_open(keyed: Live) -> None:
    checked = 0
    for route in every_route(keyed):
        path = re.sub(r"{[^}]*}", "x", route.path)
        for method in sorted(route.methods or ()):
            open_here = route.path in OPEN and method in (
                ("POST",) if route.path == "/api/sign-in" else ("GET", "HEAD")
            )
            response = keyed.http.request(method, path, json={} if method in ("POST", "PATCH", "PUT") else None)
            if open_here:
                assert response.status_code != 401 or response.json()["error"]["code"] == "invalid_sign_in", path
            else:
                assert response.status_code == 401, f"{method} {route.path} is open to strangers"
                checked += 1
    assert checked > 10


def test_metrics_are_for_this_machine_and_for_who_administers(keyed: Live, keyed_store: Store, key: str) -> None:
    assert keyed.http.get("/metrics").status_code == 200
    elsewhere = {"x-forwarded-for": "192.0.2.1"}
    assert refused(keyed.http.get("/metrics", headers=elsewhere))
    assert refused(keyed.http.get("/metrics", headers={"host": "evil.example"}))
    assert refused(keyed.http.get("/metrics", headers={"origin": "https://evil.example"}))
    assert keyed.http.get("/metrics", headers={**elsewhere, **bearer(key)}).status_code in (200, 403)  # by its role
    _, scoped = new_key(keyed_store, scopes=["use"])
    assert keyed.http.get("/metrics", headers={**elsewhere, **bearer(scoped)}).status_code == 403


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1/models/", "/V1/models", "/v1//models", "/v1/./models", "/c/../v1/models",
     "/c/a/../../v1/models", "/assets/../v1/models", "/healthz/", "/HEALTHZ", "/healthz/../v1/models",
     "/%2f", "/openapi.json", "/docs",
     "/nothing", "/api", "/api/", "/c/", "/v1/models%2f", "/v1/models;x", "/theme.js/", "/.",
     "/%00", "/api/sign-in"],
)  # fmt: skip
def test_odd_spellings_are_no_way_in(keyed: Live, path: str) -> None:
    response = raw_get(keyed, path)
    # A file of the page that is not there is the one thing that may be asked for in vain.
    assert b" 401 " in response or (path.startswith("/assets/") and b" 404 " in response), response[:200]


def raw_get(live: Live, path: str) -> bytes:
    import socket

    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


def test_what_is_open_says_nothing_of_what_is_inside(keyed: Live) -> None:
    for path in ("/healthz", "/readyz", "/", "/c/anything", "/theme.js", "/assets/a-1.js"):
        response = keyed.http.get(path)
        assert response.status_code == 200, path
        assert "scripted" not in response.text
    assert keyed.http.post("/", json={}).status_code == 401


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_one_key_in_any_of_the_usual_headers(keyed: Live, key: str, header: str) -> None:
    value = f"bearer  {key}" if header == "authorization" else key
    assert keyed.http.get("/v1/models", headers={header: value}).status_code == 200
    assert refused(keyed.http.get("/v1/models", headers={header: value[:-3] + "xxx"}))


def test_the_same_key_twice_is_one_and_two_are_none(keyed: Live, keyed_store: Store, key: str) -> None:
    other = new_key(keyed_store)[1]
    assert keyed.http.get("/v1/models", headers={**bearer(key), "x-api-key": key}).status_code == 200
    for headers in (
        {**bearer(key), "x-api-key": other},
        {"x-api-key": key, "api-key": other},
        {**bearer("nonsense"), "api-key": key},
        {"authorization": "Basic dTpw", "api-key": key},
    ):
        assert refused(keyed.http.get("/v1/models", headers=headers))
    assert refused(keyed.http.get("/v1/models", headers=[("x-api-key", key), ("x-api-key", other)]))


def test_a_key_elsewhere_is_not_looked_at(keyed: Live, key: str) -> None:
    for name in ("api_key", "key", "access_token", "api-key"):
        assert refused(keyed.http.get("/v1/models", params={name: key}))
        assert refused(keyed.http.get("/v1/models", headers={"cookie": f"{name}={key}"}))
    assert refused(keyed.http.get("/api/info", headers={"cookie": f"gale_session={key}"}))
    assert refused(keyed.http.get("/v1/models", headers={"proxy-authorization": f"Bearer {key}"}))


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ' OR '1'='1", "Bearer \xff\xfe", "Bearer " + "a" * 20_000, "Basic dTpw",
     "Bearer a b", "Bearer sk-gale-%00", "Token x", "Bearer undefined", "Bearer null"],
)  # fmt: skip
def test_what_is_no_key_is_401_whatever_it_is(keyed: Live, value: str) -> None:
    assert refused(keyed.http.get("/v1/models", headers={"authorization": value.encode("latin-1")}))  # type: ignore[dict-item]


def test_a_key_of_a_megabyte_is_refused_before_it_is_read(keyed: Live) -> None:
    with contextlib.suppress(httpx2.TransportError):  # cut off while it was sent
        assert keyed.http.get("/v1/models", headers=bearer("a" * 1_000_000)).status_code in (400, 431)


def test_the_official_client_knows_these_answers(keyed: Live, key: str) -> None:
    client = OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "one two"
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert "wrong" not in caught.value.message


def test_with_keys_the_host_header_is_worth_nothing(keyed: Live, key: str) -> None:
    for host in ("gale.example", "evil.example", "127.0.0.1"):
        assert keyed.http.get("/v1/models", headers={**bearer(key), "host": host}).status_code == 200
        assert refused(keyed.http.get("/v1/models", headers={"host": host, "x-forwarded-for": "127.0.0.1"}))
        assert host not in keyed.http.get("/v1/models/", headers={"host": host}).text


def test_a_revoked_key_is_refused_within_five_seconds(keyed: Live, keyed_store: Store) -> None:
    key_id, key = new_key(keyed_store)
    assert keyed.http.get("/v1/models", headers=bearer(key)).status_code == 200
    revoke(keyed_store, key_id)
    until(lambda: refused(keyed.http.get("/v1/models", headers=bearer(key))))


def test_an_open_stream_ends_when_its_key_is_revoked(keyed: Live, keyed_store: Store) -> None:
    key_id, key = new_key(keyed_store)
    body = {"model": "scripted/one", "messages": [{"role": "user", "content": "endless"}], "stream": True}
    active = keyed.engine.active
    with keyed.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as response:
        assert response.status_code == 200
        text = ""
        for part in response.iter_text():
            if not text:
                revoke(keyed_store, key_id)
            text += part
    assert text.endswith("\n\n")
    assert "invalid_api_key" in text.rpartition("data: ")[2]
    until(lambda: keyed.engine.active == active)


@pytest.mark.parametrize("how", ["key revoked", "owner removed"])
def test_an_answer_in_the_background_ends_with_the_right_to_it(
    keyed: Live, keyed_store: Store, key: str, how: str
) -> None:
    people = keyed_store.people(LOCAL_OWNER)
    ann = asyncio.run(people.create("Ann", f"{how[:3]}@example.com", "member"))
    asyncio.run(people.add(tables.DEFAULT_PROJECT, "member", user_id=ann.id))
    project = keyed_store.api_keys(LOCAL_OWNER, tables.DEFAULT_PROJECT)
    made, hers = asyncio.run(project.create(NewKey("hers"), ann.id))
    body = {"model": "scripted/one", "input": "endless", "background": True}
    active = keyed.engine.active
    begun = [keyed.http.post("/v1/responses", json=body, headers=bearer(each)).json()["id"] for each in (hers, key)]

    def read(response_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = keyed.http.get(f"/v1/responses/{response_id}", headers=bearer(key)).json()
        return answer

    until(lambda: [read(each)["status"] for each in begun] == ["in_progress"] * 2)
    if how == "key revoked":
        revoke(keyed_store, made.id)
    else:
        asyncio.run(people.remove(ann.id))
    until(lambda: read(begun[0])["status"] == "cancelled")
    assert "no longer valid" in read(begun[0])["error"]["message"]
    assert keyed.engine.active == active + 1
    assert read(begun[1])["status"] == "in_progress", "whoever may still use it goes on"
    assert keyed.http.post(f"/v1/responses/{begun[1]}/cancel", headers=bearer(key)).json()["error"] is None
    assert keyed.engine.active == active


def test_no_more_are_answered_in_the_background_than_there_is_room_for(
    keyed: Live, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MOST_RUNNING", 2)
    body = {"model": "scripted/one", "input": "endless", "background": True}
    active = keyed.engine.active
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda _: keyed.http.post("/v1/responses", json=body, headers=bearer(key)), range(8))
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [503] * 6
    for answer in answers:
        if answer.status_code == 200:
            keyed.http.post(f"/v1/responses/{answer.json()['id']}/cancel", headers=bearer(key)).raise_for_status()
    until(lambda: keyed.engine.active == active)


def revoke(store: Store, key_id: str) -> None:
    asyncio.run(store.api_keys(LOCAL_OWNER, tables.DEFAULT_PROJECT).revoke(key_id))


def until(condition: Callable[[], bool]) -> None:
    """Within the time that is promised, and some for a busy machine."""
    deadline = time.monotonic() + recent.FRESH_S + caller._RECHECK_S + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_its_database_it_says_so_and_lets_nobody_in(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    key = new_key(store)[1]
    server = start(store)
    try:
        assert server.http.get("/v1/models", headers=bearer(key)).status_code == 200

        async def away(work: object) -> None:
            raise StoreError("The database (gale at db.internal:5432) is away.", hint="Look at /srv/gale/gale.db.")

        store.database.read = away  # type: ignore[method-assign,assignment]
        assert server.http.get("/v1/models", headers=bearer(key)).status_code == 200, "it was known a moment ago"
        unknown = server.http.get("/v1/models", headers=bearer(new_text()))
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "store_unavailable")
        assert unknown.headers["retry-after"]
        with capture_logs() as lines:
            unknown = server.http.get("/v1/models", headers=bearer(new_text()))
        assert not re.search("internal|5432|/srv", unknown.text), "where the database is helps the operator alone"
        name = unknown.headers["x-request-id"]
        assert name in unknown.json()["error"]["message"]
        told = [line for line in lines if line.get("request_id") == name and "db.internal:5432" in str(line)]
        assert "/srv/gale/gale.db" in told[0]["hint"], "who is told"
    finally:
        server.stop()
        store.close()
    fresh = open_store(tmp_path)
    fresh.database.read = away  # type: ignore[method-assign,assignment]
    server = start(fresh)
    try:
        assert server.http.get("/v1/models").status_code == 503, "whether it needs a key is not guessed"
        assert server.http.get("/healthz").status_code in (200, 503)
    finally:
        server.stop()
        fresh.close()


def new_text() -> str:
    from gale.platform import keys

    return keys.new_key()


def test_other_pages_may_use_it_where_they_are_named(keyed: Live, key: str) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST",
           "access-control-request-headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    preflight = keyed.http.options("/v1/chat/completions", headers=ask)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert preflight.headers["access-control-allow-headers"] == ask["access-control-request-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in preflight.headers
    answer = keyed.http.post(
        "/v1/chat/completions", json=CHAT, headers={**bearer(key), "origin": "https://app.example"}
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["vary"] == "origin"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    wrong = keyed.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused(wrong)
    assert wrong.headers["access-control-allow-origin"] == "https://app.example", "a page may read why it was refused"
    for origin in ("https://evil.example", "null", "https://app.example.evil.example", "http://app.example"):
        response = keyed.http.options("/v1/chat/completions", headers={**ask, "origin": origin})
        assert response.status_code == 401
        assert "access-control-allow-origin" not in response.headers


def test_a_named_page_cannot_use_a_browser_s_sign_in(keyed: Live, keyed_store: Store) -> None:
    ann = asyncio.run(keyed_store.people(LOCAL_OWNER).create("Ann", "ann@example.com", "owner"))
    link = asyncio.run(keyed_store.sessions.link_for(LOCAL_OWNER, ann.id))
    for page in ({"origin": "https://app.example"}, {"origin": "https://app.example", "sec-fetch-site": "same-site"}):
        assert keyed.http.post("/api/sign-in", json={"token": link.token}, headers=page).status_code == 403
        session = asyncio.run(keyed_store.sessions.sign_in(link.token, None))
        cookie = {"cookie": f"{caller.COOKIE}={session}"}
        assert keyed.http.get("/api/info", headers=cookie).status_code == 200
        assert keyed.http.get("/api/info", headers={**cookie, **page}).status_code == 403
        # Anywhere else the cookie is not even looked at.
        assert refused(keyed.http.get("/v1/organization/projects", headers=cookie))
        assert refused(
            keyed.http.post("/v1/organization/admin_api_keys", json={"name": "x"}, headers={**cookie, **page})
        )
        link = asyncio.run(keyed_store.sessions.link_for(LOCAL_OWNER, ann.id))


def test_a_named_page_may_use_a_gale_without_accounts(launch: Callable[..., Live]) -> None:
    server = launch(origins=Origins(["http://localhost:3000"]))
    page = {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}
    answer = server.http.get("/v1/models", headers=page)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert server.http.get("/v1/models", headers={**page, "origin": "http://localhost:3001"}).status_code == 403
    assert server.http.get("/v1/models", headers={**page, "host": "evil.example"}).status_code == 403
