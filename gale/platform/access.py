"""Who asks, and whether they may: one rule book for HTTP, batches, jobs and the command line alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from gale.core.errors import GaleError
from gale.platform.tables import DEFAULT_ORGANISATION, DEFAULT_PROJECT, FIRST_USER

# From what anybody in a project does to what only an organisation's owner does.
Action = Literal["use", "read", "write", "administer"]
Role = Literal["owner", "member", "reader"]

_ALLOWED: dict[Role, frozenset[Action]] = {
    "owner": frozenset(("use", "read", "write", "administer")),
    "member": frozenset(("use", "read", "write")),
    "reader": frozenset(("read",)),
}


class NotAllowedError(GaleError):
    """The actor is known and may not do this."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Whoever a request, a batch or a job acts for.

    ``project_id`` is the tenant whose files, jobs and models are seen; None for an administration key. ``scopes`` and
    ``models`` narrow what a key may do; None leaves what the role allows.
    """

    organisation_id: str
    project_id: str | None
    user_id: str | None
    key_id: str | None
    role: Role
    scopes: frozenset[Action] | None = None
    models: frozenset[str] | None = None

    @property
    def project(self) -> str:
        """The tenant. Raises :class:`NotAllowedError` for whoever belongs to none, such as an administration key."""
        if self.project_id is None:
            who = "An administration key" if self.key_id else "An account without a project"
            raise NotAllowedError(
                f"{who} cannot be used here.", hint="Use a key of the project whose things these are."
            )
        return self.project_id

    def may_use(self, model: str) -> bool:
        """Whether ``model`` is one of those that this key was made for; for others it is as if they did not exist."""
        return self.models is None or model in self.models


# Whoever sits at a machine whose Gale has no accounts.
LOCAL_OWNER = Actor(DEFAULT_ORGANISATION, DEFAULT_PROJECT, FIRST_USER, None, "owner")


def actions_from(names: Iterable[str]) -> list[Action]:
    """Names of actions, as a key's scopes are given. Raises :class:`GaleError` for another word."""
    known: tuple[Action, ...] = get_args(Action)
    if wrong := sorted(set(names).difference(known)):
        raise GaleError(f"{wrong[0]!r} is no scope.", hint=f"Scopes are {', '.join(known)}.")
    return [action for action in known if action in set(names)]


def authorize(actor: Actor, action: Action) -> None:
    """Raises :class:`NotAllowedError` where ``actor`` may not do ``action`` in its project or organisation.

    Whose an object is needs no rule here: every query names the actor's project, so that another's object looks like
    one that does not exist.
    """
    if action not in _ALLOWED[actor.role] or (actor.scopes is not None and action not in actor.scopes):
        raise NotAllowedError(f"This {'key' if actor.key_id else 'account'} may not {action} here.")
