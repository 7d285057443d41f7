"""``gale admin``: accounts and keys from a shell, beside a running server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gale.cli.main import app
from gale.platform.access import Actor
from gale.platform.database import Database
from gale.platform.store import Store
from tests.cli.conftest import Gale


@pytest.fixture
def home(gale_home: Path, sqlite_template: Path) -> Path:
    """A database that is migrated already: each command opens it anew."""
    gale_home.mkdir(mode=0o700)
    (gale_home / "gale.db").write_bytes(sqlite_template.read_bytes())
    return gale_home


@pytest.fixture
def running(home: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Store]:
    """The store as a server that runs meanwhile has it open."""
    opened = Store.open(f"sqlite:///{home / 'gale.db'}", exclusive=True)
    capsys.readouterr()  # what it said is the server's
    yield opened
    opened.close()


def who(store: Store, key: str) -> Actor | None:
    return asyncio.run(store.identities().of_key(key.strip()))


def test_init_makes_the_first_key_and_a_link_once(gale: Gale, running: Store) -> None:
    made = json.loads(gale("admin", "init", "--url", "https://gale.example/", "--json").out)
    actor = who(running, made["value"])
    assert actor is not None
    assert (actor.project_id, actor.role) == ("proj_default", "member")
    address, _, token = made["sign_in"].partition("/#sign-in=")
    assert address == "https://gale.example"
    assert asyncio.run(running.sessions.sign_in(token, None))
    again = gale("admin", "init")
    assert again.code == 1
    assert "has accounts already" in again.err


def test_a_key_is_printed_alone_and_only_once(gale: Gale, running: Store) -> None:
    key = gale("admin", "key", "create", "ci", "--scope", "use", "--model", "m", "--days", "3").out
    assert key.count("\n") == 1
    actor = who(running, key)
    assert actor is not None
    assert (actor.scopes, actor.models) == ({"use"}, {"m"})
    listed = gale("admin", "key", "list").out
    assert key.strip() not in listed
    row = json.loads(gale("admin", "key", "list", "--json").out)[0]
    assert row["id"] in listed, "an id is shown whole, however narrow the terminal"
    assert row["key"] in listed
    assert gale("admin", "key", "revoke", row["id"]).out == "Revoked.\n"
    assert who(running, key) is None
    assert gale("admin", "key", "list").out == "None.\n"


def test_keys_of_every_kind(gale: Gale, running: Store) -> None:
    admin = who(running, gale("admin", "key", "create", "a", "--admin").out)
    robot = who(running, gale("admin", "key", "create", "robot", "--service").out)
    gale("admin", "user", "create", "Ann", "ann@example.com")
    ann = who(running, gale("admin", "key", "create", "k", "--owner", "ann@example.com").out)
    assert admin is not None
    assert robot is not None
    assert ann is not None
    assert (admin.project_id, admin.role) == (None, "owner")
    assert (robot.user_id or "").startswith("svc_acct_")
    assert ann.user_id not in (robot.user_id, admin.user_id)
    for wrong in (["--service", "--admin"], ["--admin", "--model", "m"], ["--service", "--owner", "ann@example.com"]):
        assert gale("admin", "key", "create", "k", *wrong).code == 2
    assert "is no scope" in gale("admin", "key", "create", "k", "--scope", "everything").err


def test_people_and_their_roles(gale: Gale, running: Store) -> None:
    made = json.loads(gale("admin", "user", "create", "Ann", "Ann@Example.com", "--json").out)
    assert made["email"] == "ann@example.com"
    assert "#sign-in=" in made["sign_in"]
    assert "#sign-in=" in gale("admin", "user", "link", "ANN@example.com").out
    assert "role: owner" in gale("admin", "user", "role", "ann@example.com", "owner").out
    assert "role: reader" in gale("admin", "user", "role", made["id"], "reader", "--project", "proj_default").out
    assert [row["role"] for row in json.loads(gale("admin", "user", "list", "--json").out)] == ["owner", "owner"]
    assert gale("admin", "user", "remove", made["id"]).out == "Removed.\n"
    assert "needs an owner" in gale("admin", "user", "remove", "user_first").err
    assert "nobody with the address" in gale("admin", "user", "link", "bo@example.com").err


def test_organisations_are_apart(gale: Gale, running: Store) -> None:
    made = json.loads(gale("admin", "org", "create", "Acme", "--owner", "bo@acme.example", "--json").out)
    assert len(json.loads(gale("admin", "org", "list", "--json").out)) == 2
    in_acme = ("--org", made["id"])
    project = json.loads(gale("admin", "project", "create", "P", *in_acme, "--json").out)
    assert [row["name"] for row in json.loads(gale("admin", "project", "list", *in_acme, "--json").out)] == [
        "P",
        "Default project",
    ]
    assert "no such project" in gale("admin", "key", "list", "--project", project["id"]).err
    actor = who(running, gale("admin", "key", "create", "k", *in_acme, "--project", project["id"]).out)
    assert actor is not None
    assert (actor.organisation_id, actor.project_id) == (made["id"], project["id"])
    assert gale("admin", "project", "archive", project["id"], *in_acme).code == 0
    assert "no organisation 'org_x'" in gale("admin", "project", "list", "--org", "org_x").err


@pytest.mark.parametrize(
    "command", [[], ["org"], ["project"], ["user"], ["key"], ["key", "create"], ["user", "create"], ["copy"]]
)
def test_help_says_what_a_command_does(gale: Gale, command: list[str]) -> None:
    shown = gale("admin", *command, "--help")
    assert shown.code == 0
    assert "Usage" in shown.out


def test_a_database_of_one_s_own(gale: Gale, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    (tmp_path / "other.db").write_bytes((home / "gale.db").read_bytes())
    gale("admin", "key", "create", "k", "--db", url)
    assert gale("admin", "key", "list").out == "None.\n"
    assert asyncio.run(Store(Database.open(url)).sessions.accounts_exist())
    monkeypatch.setenv("GALE_DB", url)
    assert "k" in gale("admin", "key", "list").out
    assert gale("admin", "key", "list", "--db", f"sqlite:///{home / 'gale.db'}").out == "None.\n", "--db is stronger"
    monkeypatch.setenv("GALE_DB", "")
    assert gale("admin", "key", "list").out == "None.\n", "empty is not given"


def test_every_command_that_takes_a_database_takes_it_from_the_environment_too() -> None:
    def options(command: Any, name: str = "gale") -> Iterator[tuple[str, Any]]:
        yield from ((name, option) for option in command.params if "--db" in option.opts)
        for word, inner in getattr(command, "commands", {}).items():
            yield from options(inner, f"{name} {word}")

    found = list(options(typer.main.get_command(app)))
    assert {"gale serve", "gale admin init", "gale admin usage", "gale admin quota limit"} <= {
        name for name, _ in found
    }
    assert {option.envvar for _, option in found} == {"GALE_DB"}
