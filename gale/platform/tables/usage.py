"""What may be used, what it costs, and what was used.

``scope`` is "organisation", "project" or "key" and ``scope_id`` the id of one; ``model`` "" stands for all models.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text, UniqueConstraint

from gale.platform.tables.base import metadata

limits = Table(
    "limits",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("scope_id", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("requests_per_day", BigInteger),
    Column("concurrency", BigInteger),
)

# Micro-units for a million tokens.
prices = Table(
    "prices",
    metadata,
    Column("model", Text, primary_key=True),
    Column("input_micro", BigInteger, nullable=False),
    Column("cached_input_micro", BigInteger, nullable=False),
    Column("output_micro", BigInteger, nullable=False),
)

budgets = Table(
    "budgets",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("scope_id", Text, primary_key=True),
    Column("period", Text, primary_key=True),  # "day", "month" or "total"
    Column("limit_micro", BigInteger, nullable=False),
    Column("period_began_at", BigInteger, nullable=False),
    Column("used_micro", BigInteger, nullable=False),
    Column("held_micro", BigInteger, nullable=False),
)

# Money that a process has set aside for the answers it is about to begin, or a job (by its id in ``process_id``) for
# its training; ``held_micro`` of a budget is their sum.
holds = Table(
    "holds",
    metadata,
    Column("process_id", Text, primary_key=True),
    Column("scope", Text, primary_key=True),
    Column("scope_id", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("amount_micro", BigInteger, nullable=False),
)

# Servers that share the database. Each counts its ``beats`` up while it lives; one whose count stands still is dead,
# which takes no clock that they would have to agree on.
processes = Table(
    "processes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("beats", BigInteger, nullable=False),
)

# What has happened is written whatever became of those it happened to, so nothing here refers to another table.
usage_events = Table(
    "usage_events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("organisation_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("user_id", Text),
    Column("api_key_id", Text),
    Column("model", Text, nullable=False),
    Column("kind", Text, nullable=False),  # "completions", "embeddings", "moderations", "fine_tuning" ...
    Column("batch", Integer, nullable=False),  # 1 where the request came from a batch
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_micro", BigInteger, nullable=False),
    Column("request_id", Text),
    Index(None, "organisation_id", "created_at"),
)

usage_rollups = Table(
    "usage_rollups",
    metadata,
    Column("hour", BigInteger, nullable=False),  # its first microsecond
    Column("organisation_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),  # "" for none, as with the key: NULL would not be unique
    Column("api_key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("batch", Integer, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_micro", BigInteger, nullable=False),
    UniqueConstraint(
        "hour",
        "organisation_id",
        "project_id",
        "user_id",
        "api_key_id",
        "model",
        "kind",
        "batch",
        name="uq_usage_rollups_axes",
    ),
    Index(None, "organisation_id", "hour"),
)
