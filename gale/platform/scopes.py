"""Whom limits and budgets are for: an organisation, one of its projects, or one key."""

from __future__ import annotations

from typing import Literal

from gale.platform.access import Actor

ScopeKind = Literal["organisation", "project", "key"]
# What kind, and the id of one.
Scope = tuple[str, str]


def scopes_of(actor: Actor) -> tuple[Scope, ...]:
    """Everything that ``actor`` is in, the widest first: each one's limits and budgets hold for it."""
    return scopes(actor.organisation_id, actor.project_id, actor.key_id)


def scopes(organisation_id: str, project_id: str | None, key_id: str | None) -> tuple[Scope, ...]:
    """The same by ids."""
    found: list[Scope] = [("organisation", organisation_id)]
    if project_id:
        found.append(("project", project_id))
    if key_id:
        found.append(("key", key_id))
    return tuple(found)
