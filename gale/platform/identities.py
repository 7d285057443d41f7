"""From a key or a session to whom it stands for, on every request.

A key is looked up by its whole HMAC, never by a part of it, and a wrong one costs the same as a right one: a digest
and a look-up, which is remembered for seconds and made together with those of other requests. What a request must not
wait for, the time of a key's last use, is written beside requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, exists, or_, select, update

from gale.core.errors import StoreError
from gale.platform import tables
from gale.platform.access import Actor, NotAllowedError, Role, authorize
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.keys import is_well_formed
from gale.platform.recent import Recent
from gale.platform.secret import Secret
from gale.platform.together import Together

_MOST_CHARACTERS = 256
_USE_WRITTEN_EVERY_S = 60.0
_FLUSH_S = 10.0


# What is shown of oneself, as its kind and its digest.
_Shown = tuple[Literal["key", "session"], bytes]


@dataclass(frozen=True, slots=True)
class _Known:
    actor: Actor
    expires_at: int | None


class Identities:
    """Belongs to one event loop; methods may raise :class:`StoreError`, which is no reason to refuse or to admit."""

    def __init__(self, database: Database, secret: Secret, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._secret = secret
        self._clock = clock
        self._known = Recent[_Known](clock=clock)
        self._local = Recent[bool](clock=clock)
        self._together = Together(self._find)
        self._accounts_exist = False
        self._used: dict[str, int] = {}
        self._use_written: dict[str, float] = {}

    async def of_key(self, key: str) -> Actor | None:
        """Whom ``key`` stands for; None where it is none of ours, has ended or was revoked (up to 5 s ago)."""
        if not is_well_formed(key):
            return None
        actor = await self._get("key", key)
        if actor is not None and actor.key_id is not None:
            self._used[actor.key_id] = now_us()
        return actor

    async def of_session(self, token: str) -> Actor | None:
        """Whom a signed-in browser's ``token`` stands for."""
        return await self._get("session", token) if len(token) <= _MOST_CHARACTERS else None

    async def accounts_exist(self) -> bool:
        """Whether this Gale has accounts, so that everybody has to say who they are; see :func:`has_accounts`."""
        if not self._accounts_exist:
            # Once true it stays so.
            self._accounts_exist = bool(await self._local.get("", lambda: self._database.read(has_accounts)))
        return self._accounts_exist

    def forget(self) -> None:
        """Obey a change that was made in this process at once."""
        self._known.forget()
        self._local.forget()

    async def keep_last_use(self) -> None:
        """Write when keys were last used, each at most once a minute. Runs beside the server until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(_FLUSH_S)
                # What could not be written is tried again: nothing is lost but how recent it is.
                with contextlib.suppress(StoreError):
                    await self.write_last_use()
        finally:
            with contextlib.suppress(StoreError):
                await self.write_last_use(everything=True)

    async def write_last_use(self, *, everything: bool = False) -> None:
        """Write what is due, or ``everything``. Raises :class:`StoreError`."""
        now = self._clock()
        due = {
            key_id: used_at
            for key_id, used_at in self._used.items()
            if everything or now - self._use_written.get(key_id, -_USE_WRITTEN_EVERY_S) >= _USE_WRITTEN_EVERY_S
        }
        if not due:
            return
        table = tables.api_keys
        statement = update(table).where(table.c.id == bindparam("key")).values(last_used_at=bindparam("used"))
        values = [{"key": key_id, "used": used_at} for key_id, used_at in due.items()]

        def work(connection: Connection) -> None:
            connection.execute(statement, values)

        await self._database.write(work)
        for key_id, used_at in due.items():
            self._use_written[key_id] = now
            if self._used.get(key_id) == used_at:
                del self._used[key_id]

    async def _get(self, kind: Literal["key", "session"], text: str) -> Actor | None:
        shown: _Shown = (kind, self._secret.digest(kind, text))
        known = await self._known.get(shown, lambda: self._together.get(shown))
        if known is None or (known.expires_at is not None and known.expires_at <= now_us()):
            return None
        return known.actor

    async def _find(self, wanted: Sequence[_Shown]) -> dict[_Shown, _Known]:
        """Those of ``wanted`` that are known, in one read."""

        def work(connection: Connection) -> dict[_Shown, _Known]:
            keys = _find_keys(connection, [digest for kind, digest in wanted if kind == "key"])
            sessions = _find_sessions(connection, [digest for kind, digest in wanted if kind == "session"])
            return {
                **{("key", digest): known for digest, known in keys.items()},
                **{("session", digest): known for digest, known in sessions.items()},
            }

        return await self._database.read(work)


def has_accounts(connection: Connection) -> bool:
    """Whether anybody but the person at this machine is known, or that person has signed in.

    True from the first key that is made (a revoked one counts), the first sign-in, or the first person added, and
    then for good: nothing of these is ever deleted, so no change to accounts can open a server again.
    """
    users = tables.users
    known = or_(users.c.claimed_at.is_not(None), users.c.id != tables.FIRST_USER)
    return bool(
        connection.scalar(select(or_(exists(select(tables.api_keys.c.id)), exists(select(users.c.id).where(known)))))
    )


def _find_keys(connection: Connection, digests: list[bytes]) -> dict[bytes, _Known]:
    if not digests:
        return {}
    keys = tables.api_keys
    rows = connection.execute(select(keys).where(keys.c.digest.in_(digests), keys.c.revoked_at.is_(None))).all()
    holders = {bytes(row.digest): _holder(connection, row) for row in rows}
    return {digest: known for digest, known in holders.items() if known is not None}


def may_go_on(connection: Connection, actor: Actor) -> bool:
    """Whether ``actor``, for whom work goes on, is still let in and may still use things: their key, or they themselves
    where they had none.
    """
    if actor.key_id is None:
        return actor.user_id is None or person(connection, actor.user_id) is not None
    keys = tables.api_keys
    row = connection.execute(select(keys).where(keys.c.id == actor.key_id, keys.c.revoked_at.is_(None))).one_or_none()
    known = None if row is None else _holder(connection, row)
    if known is None or (known.expires_at is not None and known.expires_at <= now_us()):
        return False
    try:
        authorize(known.actor, "use")
    except NotAllowedError:  # narrowed, or demoted, since it was begun
        return False
    return True


def _holder(connection: Connection, row: Row[Any]) -> _Known | None:
    """Whom a key that was not revoked stands for."""
    roles = _roles(connection, row.user_id, row.organisation_id)
    if row.project_id is None:
        role = roles.get("")
    else:
        # A project's key does not administer, whoever owns it: it lies in the settings of programs.
        role = _within(roles, row.project_id) if _is_open(connection, row.project_id) else None
        role = "member" if role == "owner" else role
    if role is None:
        return None
    actor = Actor(
        row.organisation_id,
        row.project_id,
        row.user_id,
        row.id,
        role,
        None if row.scopes is None else frozenset(row.scopes),
        None if row.models is None else frozenset(row.models),
    )
    return _Known(actor, row.expires_at)


def _find_sessions(connection: Connection, digests: list[bytes]) -> dict[bytes, _Known]:
    if not digests:
        return {}
    sessions = tables.sessions
    query = select(sessions).where(sessions.c.digest.in_(digests), sessions.c.kind == "browser")
    found: dict[bytes, _Known] = {}
    for row in connection.execute(query).all():
        if (actor := person(connection, row.user_id)) is not None:
            found[bytes(row.digest)] = _Known(actor, row.expires_at)
    return found


def person(connection: Connection, user_id: str) -> Actor | None:
    """``user_id`` as they sign in: in the organisation and the project that they came to first.

    None for somebody who is in no organisation (any more).
    """
    memberships, projects = tables.memberships, tables.projects
    organisation_id = connection.scalar(
        select(memberships.c.organisation_id)
        .where(memberships.c.user_id == user_id, memberships.c.project_id == "")
        .order_by(memberships.c.created_at, memberships.c.organisation_id)
        .limit(1)
    )
    if organisation_id is None:
        return None
    roles = _roles(connection, user_id, organisation_id)
    organisation_role = roles.get("")
    if organisation_role is None:
        return None
    mine = select(projects.c.id).where(projects.c.organisation_id == organisation_id, projects.c.archived_at.is_(None))
    if organisation_role != "owner":
        mine = mine.where(projects.c.id.in_(roles))
    project_id = connection.scalar(mine.order_by(projects.c.created_at, projects.c.id).limit(1))
    role = organisation_role if project_id is None else _within(roles, project_id)
    if role is None:
        return None
    if role == "owner" and organisation_role != "owner":
        role = "member"
    return Actor(organisation_id, project_id, user_id, None, role)


def _roles(connection: Connection, user_id: str, organisation_id: str) -> dict[str, Role]:
    """The user's role in the organisation (under "") and in its projects; nothing for one who was disabled."""
    memberships, users = tables.memberships, tables.users
    rows = connection.execute(
        select(memberships.c.project_id, memberships.c.role)
        .join(users, users.c.id == memberships.c.user_id)
        .where(memberships.c.user_id == user_id, memberships.c.organisation_id == organisation_id)
        .where(users.c.disabled_at.is_(None))
    )
    return {row.project_id: row.role for row in rows}


def _within(roles: Mapping[str, Role], project_id: str) -> Role | None:
    """The role in a project: an organisation's owner has every project."""
    return "owner" if roles.get("") == "owner" else roles.get(project_id)


def _is_open(connection: Connection, project_id: str) -> bool:
    projects = tables.projects
    query = select(projects.c.id).where(projects.c.id == project_id, projects.c.archived_at.is_(None))
    return connection.scalar(query) is not None
