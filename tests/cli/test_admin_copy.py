"""``gale admin copy``: a store that was really used goes to PostgreSQL and back, and is used on as before."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from gale.engine.local import LocalEngine
from gale.engine.request import Usage
from gale.model.transformer import Decoder
from gale.platform.access import LOCAL_OWNER
from gale.platform.journal import journal_folder
from gale.platform.metering import Metering
from gale.platform.prices import Price
from gale.platform.store import Store
from gale.text.tokenizer import Tokenizer
from tests.cli.conftest import Gale
from tests.databases import PASSWORD, PostgresqlServer, execute
from tests.platform.test_copying import rows_of
from tests.server.live import Live, eventually, start
from tests.server.tenants import Tenant, two_tenants


@pytest.fixture
def source(gale_home: Path) -> str:
    return f"sqlite:///{gale_home / 'gale.db'}"


@pytest.fixture
def target(postgresql: PostgresqlServer) -> Iterator[str]:
    with postgresql.database() as url:
        yield url


@contextmanager
def serving(url: str, model: Decoder, tokenizer: Tokenizer) -> Iterator[Live]:
    """The real server over the database at ``url``."""
    store, engine = Store.open(url, exclusive=True), LocalEngine(model, tokenizer, model_id="tiny")
    live = start(store, engine=engine)
    try:
        yield live
    finally:
        live.stop()
        asyncio.run(engine.close())
        store.close()


def use_everything(live: Live, one: Tenant) -> None:
    """What two tenants have not done yet to fill every table."""
    turn = one.send("POST", f"/api/conversations/{one.ids['page conversation_id']}/turns", json={"content": "你好"})
    assert turn.is_success, turn.text
    part = one.send("POST", f"/v1/uploads/{one.ids['upload_id']}/parts", files={"data": ("part", b"x")})
    assert part.is_success
    item = {"type": "message", "role": "user", "content": "你好 \U0001f600"}
    one.make(f"/v1/conversations/{one.ids['conversation_id']}/items", {"items": [item]})
    limit = f"/v1/organization/projects/{one.ids['project_id']}/rate_limits/rl-*"
    one.make(limit, {"max_requests_per_1_day": 10**15})
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    headers = {"authorization": f"Bearer {one.key}", "idempotency-key": "once"}
    assert live.http.post("/v1/chat/completions", json=chat, headers=headers).is_success
    eventually(lambda: one.send("GET", f"/v1/batches/{one.ids['batch_id']}").json()["status"] == "completed")

    async def beside() -> None:
        await live.store.quotas(LOCAL_OWNER, operator=True).price("tiny", Price(150_000, 75_000, 600_000))
        await live.store.sessions.link_for(LOCAL_OWNER, one.ids["user_id"])
        killed = Metering(live.store.database)  # which gives nothing back
        await killed.ready()
        await killed.purses.reserve(killed.purses.keys_of([("project", one.ids["project_id"])]), 10)

    asyncio.run(beside())


def seen(one: Tenant) -> dict[str, Any]:
    """What a client sees of the store."""
    since = int(time.time()) // 86_400 * 86_400 - 86_400
    paths = {
        "conversations": f"/v1/conversations/{one.ids['conversation_id']}/items",
        "response": f"/v1/responses/{one.ids['response_id']}",
        "page": f"/api/conversations/{one.ids['page conversation_id']}",
        "files": "/v1/files",
        "content": f"/v1/files/{one.ids['file_id']}/content",
        "batches": "/v1/batches",
        "audit": "/v1/organization/audit_logs",
        "usage": f"/v1/organization/usage/completions?start_time={since}&group_by=project_id,model,batch",
        "costs": f"/v1/organization/costs?start_time={since}&group_by=line_item",
        "budgets": "/v1/organization/budgets",
        "keys": f"/v1/organization/projects/{one.ids['project_id']}/api_keys",
    }
    answers = {name: one.send("GET", path) for name, path in paths.items()}
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(paths, 200)
    found = {name: answer.content if name == "content" else answer.json() for name, answer in answers.items()}
    for name in ("usage", "costs"):  # the last bucket goes to the present moment
        found[name] = [bucket["results"] for bucket in found[name]["data"]]
    for key in found["keys"]["data"]:
        del key["last_used_at"]
    found["budgets"] = [{**each, "held_micro": None} for each in found["budgets"]["data"]]
    return found


def written_once(url: str) -> bool:
    for change in ("UPDATE audit_events SET type = 'x'", "DELETE FROM audit_events"):
        with pytest.raises(Exception, match="written once"):
            execute(url, change)
    return True


def test_a_used_store_goes_to_postgresql_and_back(
    gale: Gale, source: str, target: str, tmp_path: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    with serving(source, model, tokenizer) as live:
        one, other = two_tenants(live, live.store)
        use_everything(live, one)
        asyncio.run(live.store.metering.queue.flush())
        before = [seen(one), seen(other)]
    rows = rows_of(source)
    assert [name for name, found in rows.items() if not found] == [], "whoever adds a table fills it here"

    done = gale("admin", "copy", "--to", target)
    assert done.code == 0, done.err
    assert "secret.key" in done.out
    assert PASSWORD not in done.out + done.err
    assert rows_of(target) == rows_of(source) == rows
    assert written_once(target)

    with serving(target, model, tokenizer) as live:
        one.http = other.http = live.http
        one.store = other.store = live.store
        assert [seen(one), seen(other)] == before
        title = one.send("PATCH", f"/api/conversations/{one.ids['page conversation_id']}", json={"title": "On"})
        assert title.is_success
        asyncio.run(live.store.metering.queue.flush())
        after = [seen(one), seen(other)]
    rows = rows_of(target)

    back = f"sqlite:///{tmp_path / 'back.db'}"
    done = gale("admin", "copy", "--db", target, "--to", back, "--json")
    assert {each["table"]: each["rows"] for each in json.loads(done.out)} == {
        name: len(found) for name, found in rows.items()
    }
    assert rows_of(back) == rows
    assert written_once(back)
    with serving(back, model, tokenizer) as live:
        one.http = other.http = live.http
        assert [seen(one), seen(other)] == after


def test_usage_that_a_killed_server_left_beside_the_database_is_taken_along(
    gale: Gale, source: str, target: str, gale_home: Path, sqlite_template: Path
) -> None:
    gale_home.mkdir(mode=0o700)
    shutil.copy(sqlite_template, gale_home / "gale.db")
    store = Store.open(source)

    async def use() -> None:
        ticket = await store.metering.admission(LOCAL_OWNER, "tiny").begin(None, "completions", None, lambda: 70, 7)
        ticket.end(Usage(70, 7))

    asyncio.run(use())
    store.close()  # without writing what waits, as a killed one
    assert os.listdir(journal_folder(source) or "")  # noqa: PTH208
    assert gale("admin", "copy", "--to", target).code == 0
    assert execute(target, "SELECT input_tokens, output_tokens FROM usage_rollups") == [(70, 7)]


def test_what_stands_in_the_way_is_said_and_changes_nothing(
    gale: Gale, source: str, target: str, gale_home: Path, sqlite_template: Path
) -> None:
    assert "There is no database" in gale("admin", "copy", "--to", target).err
    assert not (gale_home / "gale.db").exists()
    gale_home.mkdir(mode=0o700)
    shutil.copy(sqlite_template, gale_home / "gale.db")
    linked = gale_home / "linked.db"
    linked.symlink_to(gale_home / "gale.db")
    for wrong, said in (
        (source, "are the same database"),
        (f"sqlite:///{linked}", "are the same database"),
        ("sqlite://", "in memory"),
        ("mysql://host/name", "cannot open"),
    ):
        assert said in " ".join(gale("admin", "copy", "--to", wrong).err.split())

    server = Store.open(source, exclusive=True)
    assert "Another Gale server has the database" in gale("admin", "copy", "--to", target).err
    server.close()
    assert execute(target, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]

    execute(target, "CREATE TABLE theirs (a INTEGER)")
    assert "belongs to another program" in gale("admin", "copy", "--to", target).err
    execute(target, "DROP TABLE theirs")
    execute(source, "INSERT INTO prices VALUES ('tiny', 1, 1, 1)")
    assert gale("admin", "copy", "--to", target).code == 0
    assert "holds data already" in gale("admin", "copy", "--to", target).err
    execute(target, "UPDATE alembic_version SET version_num = '9999'")
    assert "newer Gale" in gale("admin", "copy", "--to", target).err
    nobody = make_url(target).set(password="wrong-secret").render_as_string(hide_password=False)
    refused = gale("admin", "copy", "--to", nobody)
    assert "password authentication failed" in refused.err
    assert "wrong-secret" not in refused.err
