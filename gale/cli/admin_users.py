"""``gale admin user ...``"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gale.cli.admin_shared import (
    ORGANISATION,
    PROJECT,
    URL,
    JsonOption,
    MaybeProjectOption,
    NameArgument,
    OrgOption,
    ProjectOption,
    UrlOption,
    UserArgument,
    every,
    find_person,
    opened,
    owner_of,
    print_rows,
    time_text,
)
from gale.cli.options import DbOption

if TYPE_CHECKING:
    from gale.platform.people import Person

Role = Literal["owner", "member", "reader"]

app = typer.Typer(help="People, and what they may do.", no_args_is_help=True)


@app.command("list")
def list_users(
    organisation: OrgOption = ORGANISATION,
    in_project: MaybeProjectOption = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """The people of an organisation, or of one of its projects, with their roles there."""
    with opened(db) as store:

        async def work() -> list[Person]:
            people = store.people(await owner_of(store, organisation))
            return await every(lambda after: people.page(in_project, limit=100, after=after))

        found = asyncio.run(work())
    print_rows([person_row(each) for each in found], as_json)


@app.command("create")
def create_user(
    name: NameArgument,
    email: Annotated[str, typer.Argument(help="Their address, which names them here; nothing is sent to it.")],
    role: Annotated[Role, typer.Option(help="In the organisation; an owner administers it.")] = "member",
    in_project: ProjectOption = PROJECT,
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """Add a person to an organisation and a project of it, and print a link that signs them in."""
    from gale.server.page_sign_in import sign_in_url

    with opened(db) as store:

        async def work() -> dict[str, Any]:
            actor = await owner_of(store, organisation)
            people = store.people(actor)
            await store.projects(actor).get(in_project)
            person = await people.create(name, email, role)
            await people.add(in_project, role, user_id=person.id)
            link = await store.sessions.link_for(actor, person.id)
            return {**person_row(person), "sign_in": sign_in_url(url, link.token)}

        row = asyncio.run(work())
    print_rows([row], as_json, single=True)


@app.command("link")
def link_user(
    who: UserArgument,
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    url: UrlOption = URL,
    as_json: JsonOption = False,
) -> None:
    """A new link that signs a person in, once and within a day."""
    from gale.server.page_sign_in import sign_in_url

    with opened(db) as store:

        async def work() -> str:
            actor = await owner_of(store, organisation)
            link = await store.sessions.link_for(actor, (await find_person(store, actor, who)).id)
            return sign_in_url(url, link.token)

        link = asyncio.run(work())
    print_rows([{"sign_in": link}], as_json, single=True)


@app.command("role")
def change_role(
    who: UserArgument,
    role: Annotated[Role, typer.Argument(help="Their new role.")],
    organisation: OrgOption = ORGANISATION,
    in_project: MaybeProjectOption = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a person a role in the organisation, or in a project (which adds them to it)."""
    from gale.platform.errors import NotFoundError

    with opened(db) as store:

        async def work() -> Person:
            actor = await owner_of(store, organisation)
            people, person = store.people(actor), await find_person(store, actor, who)
            try:
                return await people.change(person.id, role, in_project)
            except NotFoundError:
                if in_project is None:
                    raise
                return await people.add(in_project, role, user_id=person.id)

        person = asyncio.run(work())
    print_rows([person_row(person)], as_json, single=True)


@app.command("remove")
def remove_user(
    who: UserArgument,
    organisation: OrgOption = ORGANISATION,
    in_project: MaybeProjectOption = None,
    db: DbOption = None,
) -> None:
    """Take a person out of a project, or out of the organisation; their keys there no longer work."""
    with opened(db) as store:

        async def work() -> None:
            actor = await owner_of(store, organisation)
            await store.people(actor).remove((await find_person(store, actor, who)).id, in_project)

        asyncio.run(work())
    typer.echo("Removed.")


def person_row(person: Person) -> dict[str, Any]:
    return {
        "id": person.id,
        "name": person.name,
        "email": person.email,
        "role": person.role,
        "signed_in": time_text(person.claimed_at),
    }
