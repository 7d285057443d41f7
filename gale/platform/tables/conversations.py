"""The chat page's conversations and their trees of messages."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, Table, Text

from gale.platform.tables.base import metadata
from gale.platform.tables.organisations import DEFAULT_PROJECT, FIRST_USER

conversations = Table(
    "conversations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    # The end of the branch on show. Not a foreign key: the two tables would then refer to each other in a circle.
    Column("leaf_id", Text),
    # Projects and users are never deleted, so these need no foreign keys (which migration 0002 could not add).
    Column("project_id", Text, nullable=False, server_default=DEFAULT_PROJECT),
    Column("user_id", Text, nullable=False, server_default=FIRST_USER),
    Index(None, "user_id", "project_id", "updated_at", "id"),
)

messages = Table(
    "messages",
    metadata,
    Column("id", Text, primary_key=True),
    Column("conversation_id", Text, ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
    Column("parent_id", Text, ForeignKey("messages.id", ondelete="CASCADE")),
    Column("role", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("model", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Index(None, "conversation_id", "created_at"),
    Index(None, "parent_id"),
)
