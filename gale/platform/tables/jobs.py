"""Work that outlives a request: batches and fine-tuning; and answers kept for requests that are sent again."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, Table, Text

from gale.platform.tables.base import metadata

# ``state`` is the job's own word (OpenAI's: "validating_files", "in_progress" ...); a worker that holds ``lease_owner``
# until ``lease_until`` is at it, and whoever finds the lease over may take it up. ``payload`` is what was asked for and
# stays; ``result`` is how far it came.
jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("user_id", Text),
    Column("api_key_id", Text),
    Column("rights", JSON, nullable=False),  # the role, scopes and models of whoever asked
    Column("kind", Text, nullable=False),  # "batch" or "fine_tuning"
    Column("state", Text, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lease_owner", Text),
    Column("lease_until", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Index(None, "project_id", "kind", "created_at", "id"),
    Index(None, "kind", "state", "created_at"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("level", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "job_id", "position", unique=True),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("project_id", Text, ForeignKey("projects.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", Text, nullable=False),
    Column("status", Integer),  # null while the first request is being answered
    Column("response", Text),
    Column("expires_at", BigInteger, nullable=False),
    Index(None, "expires_at"),
)
