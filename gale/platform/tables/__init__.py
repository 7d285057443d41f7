"""The tables as the code uses them, one file a subject; ``migrations`` builds the same, which a test compares."""

from gale.platform.tables.base import metadata
from gale.platform.tables.conversations import conversations, messages
from gale.platform.tables.files import files, upload_parts, uploads
from gale.platform.tables.jobs import idempotency, job_events, jobs
from gale.platform.tables.organisations import (
    DEFAULT_ORGANISATION,
    DEFAULT_PROJECT,
    FIRST_USER,
    api_keys,
    audit_events,
    memberships,
    organisations,
    projects,
    sessions,
    users,
)
from gale.platform.tables.responses import response_conversations, response_items, responses
from gale.platform.tables.usage import budgets, holds, limits, prices, processes, usage_events, usage_rollups

__all__ = [
    "DEFAULT_ORGANISATION",
    "DEFAULT_PROJECT",
    "FIRST_USER",
    "api_keys",
    "audit_events",
    "budgets",
    "conversations",
    "files",
    "holds",
    "idempotency",
    "job_events",
    "jobs",
    "limits",
    "memberships",
    "messages",
    "metadata",
    "organisations",
    "prices",
    "processes",
    "projects",
    "response_conversations",
    "response_items",
    "responses",
    "sessions",
    "upload_parts",
    "uploads",
    "usage_events",
    "usage_rollups",
    "users",
]
