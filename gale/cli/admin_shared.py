"""What the verbs of ``gale admin`` share: the open store, in whose name they act, and how they print."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gale.core.errors import GaleError

if TYPE_CHECKING:
    from gale.platform.access import Actor
    from gale.platform.listing import Listing
    from gale.platform.people import Person
    from gale.platform.store import Store

Item = TypeVar("Item")

ORGANISATION, PROJECT = "org_default", "proj_default"
URL = "http://127.0.0.1:8000"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OrgOption = Annotated[str, typer.Option("--org", metavar="ID", help="Organisation.")]
ProjectOption = Annotated[str, typer.Option("--project", metavar="ID", help="Project.")]
MaybeProjectOption = Annotated[
    str | None, typer.Option("--project", metavar="ID", help="Project; the organisation itself if not given.")
]
UrlOption = Annotated[str, typer.Option("--url", help="Where people reach the server, for the link.")]
UserArgument = Annotated[str, typer.Argument(metavar="USER", help="E-mail address or id.")]
NameArgument = Annotated[str, typer.Argument(help="A name.")]


@contextlib.contextmanager
def opened(db: str | None) -> Iterator[Store]:
    from gale.core.settings import settings
    from gale.platform.store import Store

    store = Store.open(db or settings().database_url)
    try:
        yield store
    finally:
        store.close()


async def owner_of(store: Store, organisation_id: str) -> Actor:
    """Whoever has this shell may do what the organisation's owner may, in whose name new keys are made."""
    from gale.platform.access import Actor

    shell = Actor(organisation_id, None, None, None, "owner")
    people = store.people(shell)
    owners = [
        person for person in await every(lambda after: people.page(limit=100, after=after)) if person.role == "owner"
    ]
    if not owners:
        raise GaleError(
            f"There is no organisation {organisation_id!r}, or nobody owns it.", hint="See `gale admin org list`."
        )
    return Actor(organisation_id, None, owners[-1].id, None, "owner")


async def find_person(store: Store, actor: Actor, who: str) -> Person:
    people = store.people(actor)
    if "@" not in who:
        return await people.get(who)
    found = await people.page(emails=[who])
    if not found.items:
        raise GaleError(f"There is nobody with the address {who}.", hint="See `gale admin user list`.")
    return found.items[0]


async def every(page: Callable[[str | None], Awaitable[Listing[Item]]]) -> list[Item]:
    items: list[Any] = []
    more = True
    while more:
        found = await page(items[-1].id if items else None)
        items += found.items
        more = found.has_more
    return items


def time_text(microseconds: int | None) -> str | None:
    return None if microseconds is None else f"{datetime.fromtimestamp(microseconds / 1e6, UTC):%Y-%m-%dT%H:%M:%SZ}"


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_rows(rows: list[dict[str, Any]], as_json: bool, *, single: bool = False) -> None:
    """A table (one row stands upright), or JSON."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from gale.core.printable import printable

    if as_json:
        print_json(rows[0] if single else rows)
        return
    if not rows:
        typer.echo("None.")
        return

    def cell(value: Any) -> str:
        text = ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)
        return escape(printable(text))

    if single:
        for name, value in rows[0].items():
            typer.echo(f"{name}: {printable(', '.join(value) if isinstance(value, list) else str(value or '-'))}")
        return
    # As wide as it gets: an id that is cut off is of no use.
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(cell, row.values()))
    Console(width=1000).print(table)
