"""Who uses the service: organisations, their projects, people and keys, and what was done to them.

An organisation pays and owns; a project is a tenant: files, jobs, answers and fine-tuned models belong to one and are
not seen from another.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, LargeBinary, Table, Text, UniqueConstraint

from gale.platform.tables.base import metadata

# What a fresh database holds, so that a single person never has to make any of it.
DEFAULT_ORGANISATION = "org_default"
DEFAULT_PROJECT = "proj_default"
FIRST_USER = "user_first"

organisations = Table(
    "organisations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    Index(None, "organisation_id", "created_at"),
)

users = Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),  # "person", or "service" for an account that only has keys
    Column("email", Text),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("claimed_at", BigInteger),  # when the person first signed in
    Column("disabled_at", BigInteger),
    UniqueConstraint("email"),
)

# A user's role in an organisation (project_id "" there: NULL would not be unique) or in one of its projects. A service
# account is in its project alone.
memberships = Table(
    "memberships",
    metadata,
    Column("user_id", Text, ForeignKey("users.id"), primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), primary_key=True),
    Column("project_id", Text, primary_key=True, default=""),
    Column("role", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "organisation_id", "project_id"),
)

# A key is kept as the HMAC of its text; what is shown later are its first and last characters. One without a project
# is an administration key of its organisation. It may do what its owner may, or less, and ends with them.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("project_id", Text, ForeignKey("projects.id")),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("last4", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("scopes", JSON),  # null: everything that its owner's role allows
    Column("models", JSON),  # null: every model of the project
    Column("created_at", BigInteger, nullable=False),
    Column("last_used_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    UniqueConstraint("digest"),
    Index(None, "organisation_id", "project_id", "created_at"),
    Index(None, "user_id"),
)

# Signed-in browsers ("browser"), and the links that sign one in once ("link"); kept as HMAC like keys.
sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, ForeignKey("users.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    UniqueConstraint("digest"),
    Index(None, "user_id"),
)

# Written, never changed: triggers refuse updates and deletions. ``actor`` is whoever it was as they were then; the ids
# beside it are what the log is searched by, and so is ``resource_id``, the id of what was changed.
audit_events = Table(
    "audit_events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("project_id", Text),
    Column("type", Text, nullable=False),
    Column("user_id", Text),
    Column("api_key_id", Text),
    Column("resource_id", Text),
    Column("actor", JSON, nullable=False),
    Column("details", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "organisation_id", "created_at", "id"),
)
