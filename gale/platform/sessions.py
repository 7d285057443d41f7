"""Signing in to the chat page: links that work once, and the browsers that they signed in."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, delete, insert, select, update

from gale.platform import tables
from gale.platform.access import LOCAL_OWNER, Actor, authorize
from gale.platform.audit import record
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import NotFoundError
from gale.platform.identities import has_accounts, person
from gale.platform.ids import new_id
from gale.platform.secret import Secret
from gale.platform.text import storable

LINK_S = 24 * 3600
SESSION_S = 30 * 24 * 3600
_MOST_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Link:
    """What signs a browser in, once. ``token`` is shown now and never again."""

    token: str
    expires_at: int


class Sessions:
    """Links and signed-in browsers. Every method may raise :class:`StoreError`."""

    def __init__(self, database: Database, secret: Secret) -> None:
        self._database = database
        self._secret = secret

    async def owner_link(self) -> Link | None:
        """A link that makes whoever opens it the owner of this Gale; None once there is one."""
        token, digest = self._new("link")

        def work(connection: Connection) -> Link | None:
            users = tables.users
            claimed = connection.scalar(select(users.c.claimed_at).where(users.c.id == tables.FIRST_USER))
            return _insert(connection, tables.FIRST_USER, token, digest) if claimed is None else None

        return await self._database.write(work)

    async def link_for(self, actor: Actor, user_id: str) -> Link:
        """A link for a person of the organisation that ``actor`` administers.

        Raises :class:`NotAllowedError` and :class:`NotFoundError`.
        """
        authorize(actor, "administer")
        token, digest = self._new("link")

        def work(connection: Connection) -> Link:
            memberships, users = tables.memberships, tables.users
            found = connection.scalar(
                select(memberships.c.user_id)
                .join(users, users.c.id == memberships.c.user_id)
                .where(memberships.c.user_id == storable(user_id), memberships.c.project_id == "")
                .where(memberships.c.organisation_id == actor.organisation_id, users.c.kind == "person")
            )
            if found is None:
                raise NotFoundError("There is no such person in this organisation.")
            return _insert(connection, found, token, digest)

        return await self._database.write(work)

    async def sign_in(self, token: str, address: str | None) -> str | None:
        """Use a link up; the new session's token, or None where it is no link, too old or was used before.

        The first person's first sign-in is what ends local mode; see :func:`has_accounts`.
        """
        digest = self._secret.digest("link", token[:_MOST_CHARACTERS])
        session, session_digest = self._new("session")

        def work(connection: Connection) -> str | None:
            sessions, users, now = tables.sessions, tables.users, now_us()
            row = connection.execute(
                select(sessions.c.user_id, sessions.c.expires_at).where(
                    sessions.c.digest == digest, sessions.c.kind == "link"
                )
            ).one_or_none()
            actor = person(connection, row.user_id) if row is not None and row.expires_at > now else None
            if row is None or actor is None:
                return None
            # Whoever signed in has no use for other links, and lost ones should not stay good.
            connection.execute(delete(sessions).where(sessions.c.user_id == row.user_id, sessions.c.kind == "link"))
            connection.execute(
                update(users).where(users.c.id == row.user_id, users.c.claimed_at.is_(None)).values(claimed_at=now)
            )
            _insert_session(connection, row.user_id, "browser", session_digest, SESSION_S)
            record(connection, actor, "login.succeeded", None, address=address)
            return session

        return await self._database.write(work)

    async def sign_out(self, actor: Actor, token: str) -> None:
        """End a session."""
        digest = self._secret.digest("session", token[:_MOST_CHARACTERS])

        def work(connection: Connection) -> None:
            sessions = tables.sessions
            ended = connection.execute(
                delete(sessions).where(sessions.c.digest == digest, sessions.c.kind == "browser")
            )
            if ended.rowcount:
                record(connection, actor, "logout.succeeded", None)

        await self._database.write(work)

    async def note_failure(self, address: str | None) -> None:
        """Write down that a sign-in failed."""
        nobody = Actor(LOCAL_OWNER.organisation_id, None, None, None, "reader")
        await self._database.write(lambda connection: record(connection, nobody, "login.failed", None, address=address))

    async def accounts_exist(self) -> bool:
        """See :func:`has_accounts`."""
        return await self._database.read(has_accounts)

    def _new(self, kind: Literal["link", "session"]) -> tuple[str, bytes]:
        token = secrets.token_urlsafe(32)
        return token, self._secret.digest(kind, token)


def _insert(connection: Connection, user_id: str, token: str, digest: bytes) -> Link:
    return Link(token, _insert_session(connection, user_id, "link", digest, LINK_S))


def _insert_session(connection: Connection, user_id: str, kind: str, digest: bytes, seconds: int) -> int:
    sessions, now = tables.sessions, now_us()
    # What is over goes when something new comes, so that nothing has to sweep.
    connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
    expires_at = now + seconds * 1_000_000
    connection.execute(
        insert(sessions).values(
            id=new_id("session"),
            user_id=user_id,
            kind=kind,
            digest=digest,
            created_at=now,
            expires_at=expires_at,
        )
    )
    return expires_at
