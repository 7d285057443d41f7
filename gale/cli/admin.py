"""``gale admin ...``: accounts and keys, on the database itself, beside a running server or without one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gale.cli import admin_copy, admin_keys, admin_usage, admin_users
from gale.cli.admin_keys import key_row
from gale.cli.admin_shared import (
    ORGANISATION,
    PROJECT,
    URL,
    JsonOption,
    NameArgument,
    OrgOption,
    UrlOption,
    every,
    opened,
    owner_of,
    print_json,
    print_rows,
    time_text,
)
from gale.cli.options import DbOption
from gale.core.errors import GaleError

if TYPE_CHECKING:
    from gale.platform.api_keys import ApiKey
    from gale.platform.organisations import Project

app = typer.Typer(help="Accounts and keys of this Gale.", no_args_is_help=True)
org = typer.Typer(help="Organisations: each has projects, people and keys of its own.", no_args_is_help=True)
project = typer.Typer(help="Projects: files, jobs and answers of one are not seen from another.", no_args_is_help=True)
app.add_typer(org, name="org")
app.add_typer(project, name="project")
app.add_typer(admin_users.app, name="user")
app.add_typer(admin_keys.app, name="key")
app.add_typer(admin_usage.quota, name="quota")
app.command("usage")(admin_usage.usage)
app.command("copy")(admin_copy.copy)


@app.command()
def init(db: DbOption = None, url: UrlOption = URL, as_json: JsonOption = False) -> None:
    """Make the first key, and a link that signs the owner in. From then on this Gale serves nobody without a key."""
    from gale.platform.api_keys import NewKey
    from gale.server.page_sign_in import sign_in_url

    with opened(db) as store:

        async def work() -> tuple[ApiKey, str, str | None]:
            if await store.sessions.accounts_exist():
                raise GaleError(
                    "This Gale has accounts already.",
                    hint="`gale admin key create` makes further keys, `user link` links.",
                )
            link = await store.sessions.owner_link()
            made, text = await store.api_keys(await owner_of(store, ORGANISATION), PROJECT).create(NewKey("first key"))
            return made, text, None if link is None else sign_in_url(url, link.token)

        made, text, link = asyncio.run(work())
    if as_json:
        print_json({**key_row(made), "value": text, "sign_in": link})
        return
    typer.echo(f"API key (shown this once): {text}")
    typer.echo(f"Sign the owner in (once, within a day): {link}")


@org.command("list")
def org_list(db: DbOption = None, as_json: JsonOption = False) -> None:
    """All organisations."""
    with opened(db) as store:
        found = asyncio.run(store.organisations.all())
    print_rows([{"id": each.id, "name": each.name, "created": time_text(each.created_at)} for each in found], as_json)


@org.command("create")
def org_create(
    name: NameArgument,
    owner: Annotated[str, typer.Option(metavar="EMAIL", help="Address of the person who will own it.")],
    db: DbOption = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """A new organisation with one project, and a link that signs its owner in."""
    from gale.platform.access import Actor
    from gale.server.page_sign_in import sign_in_url

    with opened(db) as store:

        async def work() -> dict[str, Any]:
            made, first = await store.organisations.create(name)
            shell = Actor(made.id, None, None, None, "owner")
            person = await store.people(shell).create(owner.partition("@")[0], owner, "owner")
            link = await store.sessions.link_for(shell, person.id)
            sign_in = sign_in_url(url, link.token)
            return {"id": made.id, "name": made.name, "project": first.id, "owner": person.id, "sign_in": sign_in}

        row = asyncio.run(work())
    print_rows([row], as_json, single=True)


@project.command("list")
def project_list(
    organisation: OrgOption = ORGANISATION,
    archived: Annotated[bool, typer.Option("--archived", help="Archived ones too.")] = False,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """The projects of an organisation."""
    with opened(db) as store:

        async def work() -> list[Project]:
            projects = store.projects(await owner_of(store, organisation))
            return await every(lambda after: projects.page(limit=100, after=after, archived=archived))

        found = asyncio.run(work())
    print_rows([project_row(each) for each in found], as_json)


@project.command("create")
def project_create(
    name: NameArgument, organisation: OrgOption = ORGANISATION, db: DbOption = None, as_json: JsonOption = False
) -> None:
    """A new project."""
    with opened(db) as store:

        async def work() -> Project:
            return await store.projects(await owner_of(store, organisation)).create(name)

        made = asyncio.run(work())
    print_rows([project_row(made)], as_json, single=True)


@project.command("archive")
def project_archive(
    project_id: Annotated[str, typer.Argument(metavar="ID", help="Which.")],
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the use of a project for good: its keys no longer work, what it holds stays."""
    with opened(db) as store:

        async def work() -> Project:
            return await store.projects(await owner_of(store, organisation)).archive(project_id)

        made = asyncio.run(work())
    print_rows([project_row(made)], as_json, single=True)


def project_row(project: Project) -> dict[str, Any]:
    return {
        "id": project.id,
        "name": project.name,
        "created": time_text(project.created_at),
        "archived": time_text(project.archived_at),
    }
