"""What ``/v1/organization`` takes and gives: OpenAI's objects, and nothing in a body that is not named here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gale.platform import tables
from gale.platform.access import Action, Role
from gale.platform.api_keys import ApiKey
from gale.platform.audit import AuditEvent
from gale.platform.organisations import Project
from gale.platform.people import Person
from gale.platform.sessions import Link
from gale.server.errors import ApiError

MOST_NAME_CHARACTERS = 200
_MOST_SECONDS = 10 * 365 * 86_400


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _address(text: str) -> str:
    if text.strip().count("@") != 1 or text.strip().startswith("@") or text.strip().endswith("@"):
        raise ValueError("must be an e-mail address")
    return text


Name = Annotated[str, Field(max_length=MOST_NAME_CHARACTERS), AfterValidator(_not_blank)]
Email = Annotated[str, Field(max_length=254), AfterValidator(_address)]
Seconds = Annotated[int, Field(ge=1, le=_MOST_SECONDS)]
Scopes = Annotated[list[Action], Field(max_length=4)]
Models = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=100)]
Id = Annotated[str, Field(min_length=1, max_length=200)]


class Exact(BaseModel):
    """A body of named fields: any other is refused, so that nobody gives themselves a role; null is as if left out."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class NewProject(Exact):
    """A project to make."""

    name: Name


class ProjectChange(Exact):
    """A project's new name."""

    name: Name | None = None


class NewAdminKey(Exact):
    """An administration key to make."""

    name: Name
    expires_in_seconds: Seconds | None = None


class NewServiceAccount(Exact):
    """A service account to make, with its first key."""

    name: Name
    create_service_account_only: Literal[False] | None = None
    expires_in_seconds: Seconds | None = None


class ServiceAccountChange(Exact):
    """A service account's new name or role."""

    name: Name | None = None
    role: Literal["owner", "member"] | None = None


class NewAccountKey(Exact):
    """A further key for a service account."""

    name: Name = "Secret key"
    scopes: Scopes | None = None
    models: Models | None = None
    expires_in_seconds: Seconds | None = None


class NewProjectKey(NewAccountKey):
    """A key for a person, or a service account; the caller's own if none is named."""

    user_id: Id | None = None


class KeyChange(Exact):
    """What a key may do from now on (an empty list: whatever its owner may), and until when."""

    scopes: Scopes | None = None
    expires_in_seconds: Seconds | None = None


class NewUser(Exact):
    """A person to add to the organisation."""

    name: Name
    email: Email
    role: Role = "member"


class UserChange(Exact):
    """A person's new role in the organisation."""

    role: Role


class NewProjectUser(Exact):
    """One of the organisation's people, and their role in the project."""

    role: Role
    user_id: Id | None = None
    email: Email | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> NewProjectUser:
        if (self.user_id is None) == (self.email is None):
            raise ValueError("give either 'user_id' or 'email'")
        return self


def only_known_query(request: Request) -> None:
    """Refuse parameters that a route does not have. Raises :class:`ApiError` 400 naming the first."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise ApiError(
                400,
                f"The parameter '{name[:100]}' is not supported here.",
                code="unsupported_parameter",
                param=name[:100],
            )


def project_json(project: Project) -> dict[str, Any]:
    """OpenAI's ``organization.project``."""
    return {
        "id": project.id,
        "object": "organization.project",
        "name": project.name,
        "created_at": _seconds(project.created_at),
        "archived_at": _seconds(project.archived_at),
        "status": "active" if project.archived_at is None else "archived",
    }


def admin_key_json(key: ApiKey) -> dict[str, Any]:
    """OpenAI's ``organization.admin_api_key``."""
    owner: dict[str, Any] = {"type": "user", "object": "organization.user", "id": key.owner_id}
    if key.owner is not None:
        created_at = _seconds(key.owner.created_at)
        owner = {**owner, "name": key.owner.name, "created_at": created_at, "role": key.owner.role}
    return {"object": "organization.admin_api_key", **_key_json(key), "owner": owner}


def project_key_json(key: ApiKey) -> dict[str, Any]:
    """OpenAI's ``organization.project.api_key``, and what the key is limited to."""
    owner: dict[str, Any] = {"type": "user"}
    if key.owner is not None:
        kind = "user" if key.owner.kind == "person" else "service_account"
        about = {"id": key.owner.id, "name": key.owner.name, "created_at": _seconds(key.owner.created_at)}
        address = {"email": key.owner.email or ""} if kind == "user" else {}
        owner = {"type": kind, kind: {**about, **address, "role": key.owner.role}}
    return {
        "object": "organization.project.api_key",
        **_key_json(key),
        "owner": owner,
        "owner_project_access": "active" if key.owner is not None else "inactive",
        "scopes": key.scopes,
        "models": key.models,
    }


def account_key_json(key: ApiKey, value: str) -> dict[str, Any]:
    """A service account's new key, with its text."""
    return {
        "object": "organization.project.service_account.api_key",
        "id": key.id,
        "name": key.name,
        "created_at": _seconds(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "value": value,
    }


def account_json(account: Person) -> dict[str, Any]:
    """OpenAI's ``organization.project.service_account``."""
    return {
        "object": "organization.project.service_account",
        "id": account.id,
        "name": account.name,
        "role": account.role,
        "created_at": _seconds(account.created_at),
    }


def user_json(person: Person) -> dict[str, Any]:
    """OpenAI's ``organization.user``."""
    return {
        "object": "organization.user",
        "id": person.id,
        "name": person.name,
        "email": person.email,
        "role": person.role,
        "added_at": _seconds(person.added_at),
        "created": _seconds(person.created_at),
        "is_default": person.id == tables.FIRST_USER,
        "is_service_account": False,
    }


def project_user_json(person: Person) -> dict[str, Any]:
    """OpenAI's ``organization.project.user``."""
    return {
        "object": "organization.project.user",
        "id": person.id,
        "name": person.name,
        "email": person.email,
        "role": person.role,
        "added_at": _seconds(person.added_at),
    }


def link_json(link: Link) -> dict[str, Any]:
    """A sign-in link without its address, which a server does not know: the page's, and ``#sign-in=`` before this."""
    return {
        "object": "organization.user.sign_in_link",
        "token": link.token,
        "expires_at": _seconds(link.expires_at),
    }


def audit_json(event: AuditEvent) -> dict[str, Any]:
    """OpenAI's audit log object."""
    project = {} if event.project_id is None else {"project": {"id": event.project_id, "name": ""}}
    return {
        "id": event.id,
        "object": "organization.audit_log",
        "type": event.type,
        "effective_at": _seconds(event.created_at),
        **project,
        "actor": event.actor,
        event.type: event.details,
    }


def deleted_json(kind: str, id: str) -> dict[str, Any]:
    """What is answered when something is gone."""
    return {"object": f"{kind}.deleted", "id": id, "deleted": True}


def _key_json(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "redacted_value": key.redacted,
        "created_at": _seconds(key.created_at),
        "last_used_at": _seconds(key.last_used_at),
        "expires_at": _seconds(key.expires_at),
    }


def _seconds(microseconds: int | None) -> int | None:
    return None if microseconds is None else microseconds // 1_000_000
