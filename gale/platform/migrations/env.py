"""Alembic's entry point: runs the steps on the connection and inside the transaction that our caller opened."""

from __future__ import annotations

from alembic import context

from gale.platform.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # Alembic supposes that SQLite commits each CREATE TABLE by itself. With explicit BEGIN it does not, so a step
    # that is cut short leaves nothing behind.
    transactional_ddl=True,
)
context.run_migrations()
