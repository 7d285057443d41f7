"""Answers of the Responses API that were asked to be kept, and its conversations of items."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, Integer, Table, Text

from gale.platform.tables.base import metadata

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("previous_id", Text),
    Column("conversation_id", Text),
    Column("status", Text, nullable=False),
    Column("input", JSON, nullable=False),  # the items that this request brought
    Column("body", JSON, nullable=False),  # the response object as it is returned
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Index(None, "project_id", "created_at"),
    Index(None, "expires_at"),
)

response_conversations = Table(
    "response_conversations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "project_id", "created_at"),
)

response_items = Table(
    "response_items",
    metadata,
    Column("id", Text, primary_key=True),
    Column("conversation_id", Text, ForeignKey("response_conversations.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "conversation_id", "position", unique=True),
)
