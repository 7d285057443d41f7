"""A web page that the owner visits can neither use their model nor read their conversations."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from gale.platform.store import Store
from gale.server.local_guard import is_loopback
from gale.server.origins import Origins
from tests.server.live import Live, start
from tests.server.tenants import every_route


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1234", "127.0.0.2", "[::1]", "[::1]:8000"])
def test_loopback_hosts_are_served(live: Live, host: str) -> None:
    assert live.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.1",
     "localhost@evil", "evil/@localhost", "", "[::1", "0.0.0.0", "evil#@127.0.0.1"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/v1/models", "/api/conversations", "/nothing"])
def test_other_hosts_are_refused(live: Live, host: str, path: str) -> None:
    response = live.http.get(path, headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden_origin"


def test_our_own_page_is_served(live: Live) -> None:
    headers = {"origin": live.url, "sec-fetch-site": "same-origin"}
    assert live.http.post("/api/conversations", json={}, headers=headers).status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    ],
)
def test_other_pages_are_refused(live: Live, headers: dict[str, str]) -> None:
    before = len(live.http.get("/api/conversations?limit=100").json()["conversations"])
    assert live.http.post("/api/conversations", json={}, headers=headers).status_code == 403
    assert live.http.get("/api/conversations", headers=headers).status_code == 403
    assert live.http.options("/v1/chat/completions", headers=headers).status_code == 403
    assert len(live.http.get("/api/conversations?limit=100").json()["conversations"]) == before


def test_a_link_to_the_page_may_be_followed_but_a_form_not_sent(live: Live) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert live.http.get("/", headers=headers).status_code in (200, 503)
    assert live.http.post("/api/conversations", json={}, headers=headers).status_code == 403


@pytest.mark.parametrize("key", [None, "x", "' OR '1'='1"])
def test_any_key_or_none_is_accepted_here(live: Live, key: str | None) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    assert live.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded", "X-Real-IP", "Via",
     "CF-Connecting-IP", "CF-Ray", "CDN-Loop", "True-Client-IP", "X-Client-IP", "X-Original-Forwarded-For",
     "Fly-Client-IP", "X-Envoy-External-Address"],
)  # fmt: skip
def test_a_proxy_on_this_machine_is_told_to_make_keys(live: Live, name: str) -> None:
    for path in ("/", "/v1/models", "/api/conversations", "/metrics", "/healthz", "/nothing"):
        for value in ("127.0.0.1", "for=localhost", ""):  # what it says is not believed, so it does not matter
            response = live.http.get(path, headers={name: value})
            assert response.status_code == 403, path
            error = response.json()["error"]
            assert error["code"] == "keys_required"
            assert "`gale admin init`" in error["message"]


PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def with_page(store: Store) -> Iterator[Live]:
    server = start(store, origins=Origins([PAGE]))
    yield server
    server.stop()


@pytest.mark.parametrize("site", [{"sec-fetch-site": "same-site"}, {"sec-fetch-site": "same-origin"}, {}])
def test_a_page_allowed_by_name_neither_administers_nor_reads_the_chat_pages_conversations(
    with_page: Live, site: dict[str, str]
) -> None:
    page = {"origin": PAGE, **site}
    assert with_page.http.get("/v1/models", headers=page).status_code == 200
    tried = 0
    for route in every_route(with_page):
        if route.path.startswith(("/v1/organization", "/api/")):
            path = re.sub(r"{[^}]*}", "x", route.path)
            for method in sorted(route.methods or ()):
                response = with_page.http.request(method, path, json={"name": "x"}, headers=page)
                assert response.status_code == 403, f"{method} {path}"
                assert response.json()["error"]["code"] == "forbidden_origin"
                tried += 1
    assert tried > 30
    assert not asyncio.run(with_page.store.sessions.accounts_exist())


def test_loopback_names() -> None:
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "[::1]"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "gale.example", "10.0.0.1", "", "0x7f000001"))
