"""The chat page's conversations over HTTP."""

from __future__ import annotations

import time

import pytest

from gale import __version__
from tests.server.live import Live

pytestmark = pytest.mark.both_databases


def new(live: Live) -> str:
    response = live.http.post("/api/conversations", json={})
    assert response.status_code == 201
    return str(response.json()["id"])


def test_info(live: Live) -> None:
    assert live.http.get("/api/info").json() == {
        "name": "Gale",
        "version": __version__,
        "model": {"id": "scripted/one", "context_length": 100},
        "signed_in": False,
    }


def test_a_new_conversation_is_empty_and_first_in_the_list(live: Live) -> None:
    before = int(time.time())
    created = live.http.post("/api/conversations", json={}).json()
    assert created["title"] == ""
    assert before <= created["created_at"] <= created["updated_at"] <= time.time()
    listed = live.http.get("/api/conversations").json()["conversations"][0]
    assert {**listed, "leaf_id": None} == created
    whole = live.http.get(f"/api/conversations/{created['id']}").json()
    assert whole == {**created, "leaf_id": None, "messages": []}


def test_pages_follow_each_other_without_gap_or_repetition(live: Live) -> None:
    made = [new(live) for _ in range(7)]
    seen: list[str] = []
    cursor = ""
    while len(seen) < 7:
        page = live.http.get("/api/conversations", params={"limit": 3, "cursor": cursor}).json()
        seen += [each["id"] for each in page["conversations"]]
        cursor = page["next_cursor"]
    assert seen[:7] == made[::-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "cursor=nonsense", "cursor=%00", "cursor=LTE6YQ"])
def test_bad_pages(live: Live, query: str) -> None:
    response = live.http.get(f"/api/conversations?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_rename_and_delete(live: Live) -> None:
    url = f"/api/conversations/{new(live)}"
    renamed = live.http.patch(url, json={"title": "  A new\nname 名字 "})
    assert (renamed.status_code, renamed.json()["title"]) == (200, "A new name 名字")
    assert live.http.patch(url, json={"title": None}).json()["title"] == "A new name 名字"
    for bad in ({"title": ""}, {"title": " \n"}, {"title": 3}, {"title": "x" * 201}, {"leaf_id": 3}):
        assert live.http.patch(url, json=bad).status_code == 400
    deleted = live.http.delete(url)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert live.http.delete(url).status_code == 404
    assert live.http.get(url).status_code == 404


@pytest.mark.parametrize("wrong", ["conv_nothing", "a%00b", "..", "%2e%2e%2f", "x" * 300])
def test_wrong_ids(live: Live, wrong: str) -> None:
    url = f"/api/conversations/{wrong}"
    answers = [
        live.http.get(url),
        live.http.patch(url, json={"title": "x"}),
        live.http.delete(url),
        live.http.post(f"{url}/turns", json={"content": "x", "parent_id": None}),
    ]
    for answer in answers:
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]
