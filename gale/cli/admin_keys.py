"""``gale admin key ...``"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gale.cli.admin_shared import (
    ORGANISATION,
    PROJECT,
    JsonOption,
    NameArgument,
    OrgOption,
    ProjectOption,
    every,
    find_person,
    opened,
    owner_of,
    print_json,
    print_rows,
    time_text,
)
from gale.cli.options import DbOption

if TYPE_CHECKING:
    from gale.platform.api_keys import ApiKey

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command("list")
def list_keys(
    in_project: ProjectOption = PROJECT,
    admin: Annotated[bool, typer.Option("--admin", help="Those that administer the organisation.")] = False,
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """The keys of a project that were not revoked."""
    with opened(db) as store:

        async def work() -> list[ApiKey]:
            keys = store.api_keys(await owner_of(store, organisation), None if admin else in_project)
            return await every(lambda after: keys.page(limit=100, after=after))

        found = asyncio.run(work())
    print_rows([key_row(each) for each in found], as_json)


@app.command("create")
def create_key(
    name: NameArgument,
    in_project: ProjectOption = PROJECT,
    admin: Annotated[
        bool, typer.Option("--admin", help="One that administers the organisation and uses no model.")
    ] = False,
    owner: Annotated[
        str | None, typer.Option(metavar="USER", help="Whose it is: address or id; the owner's if not given.")
    ] = None,
    service: Annotated[bool, typer.Option("--service", help="For a new service account of that name.")] = False,
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may do: use, read, write; everything if not given. Repeatable.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use; every one if not given. Repeatable.")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="Until it ends; never if not given.")] = None,
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """A new key, printed this once."""
    from gale.platform.access import actions_from
    from gale.platform.api_keys import NewKey

    if (service and (admin or owner is not None)) or (admin and (scope or model)):
        raise typer.BadParameter("--service goes with neither --admin nor --owner, --admin with no --scope or --model")
    new = NewKey(name, actions_from(scope) if scope else None, model or None, None if days is None else days * 86_400)
    with opened(db) as store:

        async def work() -> tuple[ApiKey, str]:
            actor = await owner_of(store, organisation)
            owner_id = None if owner is None else (await find_person(store, actor, owner)).id
            if service:
                owner_id = (await store.service_accounts(actor, in_project).create(name)).id
            return await store.api_keys(actor, None if admin else in_project).create(new, owner_id)

        made, text = asyncio.run(work())
    if as_json:
        print_json({**key_row(made), "value": text})
    else:
        typer.echo(text)


@app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Which; see `gale admin key list`.")],
    in_project: ProjectOption = PROJECT,
    admin: Annotated[bool, typer.Option("--admin", help="One that administers the organisation.")] = False,
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
) -> None:
    """End a key for good; running servers obey within 5 seconds."""
    with opened(db) as store:

        async def work() -> None:
            await store.api_keys(await owner_of(store, organisation), None if admin else in_project).revoke(key_id)

        asyncio.run(work())
    typer.echo("Revoked.")


def key_row(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "key": key.redacted,
        "owner": key.owner.name if key.owner else None,
        "scopes": key.scopes,
        "models": key.models,
        "last_used": time_text(key.last_used_at),
        "ends": time_text(key.expires_at),
    }
