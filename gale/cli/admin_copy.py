"""``gale admin copy``: take a store along to another database."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from gale.cli.admin_shared import JsonOption, print_rows
from gale.cli.options import DbOption

if TYPE_CHECKING:
    from gale.platform.copying import Counts


def copy(
    to: Annotated[
        str,
        typer.Option("--to", metavar="URL", help="An empty database: postgresql+asyncpg://... or sqlite:///path."),
    ],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy all that is stored into another, empty database: from SQLite to PostgreSQL, or back.

    No server may run on either meanwhile. The target is filled wholly or not at all, and the source stays as it is.
    """
    from sqlalchemy import make_url

    from gale.core.settings import settings
    from gale.platform.copying import check_addresses
    from gale.platform.copying import copy as copy_rows
    from gale.platform.database import Database
    from gale.platform.store import Store

    source_url = db or settings().database_url
    check_addresses(source_url, to)
    with (
        contextlib.closing(Store.open(source_url, exclusive=True)) as source,
        contextlib.closing(Database.open(to, exclusive=True)) as target,
    ):

        async def work() -> Counts:
            # A server that was killed may have left usage beside the database, which only the next one would look for.
            await source.metering.queue.replay()
            return await copy_rows(source.database, target)

        counts = asyncio.run(work())
    print_rows([{"table": name, "rows": rows} for name, rows in counts.items()], as_json)
    if not as_json:
        typer.echo(f"\nAll of it is in {make_url(to).render_as_string(hide_password=True)}, counted again there.")
        typer.echo(_beside())


def _beside() -> str:
    from gale.core.settings import settings

    home = settings().home
    return (
        f"Not in a database, and needed as before, from {home}:\n"
        "  secret.key  without it (or GALE_SECRET) no key and no sign-in works\n"
        "  files/      the bytes of files and of batches at work, unless --files names another folder\n"
        "  jobs/       fine-tuned models, and what fine-tuning needs to go on\n"
        "  models/     models by name\n"
        "A server on this machine finds them there; for one on another, copy them."
    )
