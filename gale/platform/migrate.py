"""Brings a database to the shape this version of Gale expects, once, however many processes start together."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from gale.core.errors import StoreError

MIGRATIONS = Path(__file__).parent / "migrations"


def check_ours(connection: Connection) -> None:
    """Refuse a database that another program or a newer Gale made, before anything in it is touched.

    Raises :class:`StoreError`.
    """
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None:
        if inspect(connection).get_table_names():
            raise StoreError(
                "This database belongs to another program: it has tables, but none of Gale's.",
                hint="Give --db a file of its own; Gale makes it.",
            )
        return
    if revision not in {script.revision for script in _scripts(connection).walk_revisions()}:
        raise StoreError(
            f"This database was made by a newer Gale (its revision is {revision}, which this version does not know).",
            hint="Update Gale, or give --db another file. Nothing was changed.",
        )


def pending_revision(connection: Connection) -> str | None:
    """The revision to which an older database of ours is going to be brought; None for a new or a current one."""
    revision, newest = (
        MigrationContext.configure(connection).get_current_revision(),
        _scripts(connection).get_current_head(),
    )
    return newest if revision not in (None, newest) else None


def migrate(connection: Connection) -> None:
    """Apply the missing steps. The caller holds the lock under which databases are migrated, and commits.

    Under that lock the revision is read again, so a process that waited while another migrated finds nothing left
    to do. Raises :class:`StoreError` as :func:`check_ours` does.
    """
    check_ours(connection)
    command.upgrade(_config(connection), "head")


def _scripts(connection: Connection) -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(connection))


def _config(connection: Connection) -> Config:
    config = Config()
    # The option is a ConfigParser value, where a percent sign in a folder's name would begin an interpolation.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
