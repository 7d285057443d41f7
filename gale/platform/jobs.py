"""Work that outlives a request and the process that began it: batches and fine-tuning.

A job is a row with a ``state`` of its kind's own. A worker *claims* one for a while (its lease) and *renews* that while
it works; a worker that was killed renews nothing, so that another takes the job up when the lease is over. ``attempt``
counts the claims: whoever comes back late finds another's number there, and may not write any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, and_, func, insert, or_, select, update

from gale.platform import tables
from gale.platform.access import Action, Actor
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import ConflictError, LeaseLostError, NotFoundError
from gale.platform.ids import new_id
from gale.platform.listing import Listing, Order, page_of
from gale.platform.text import storable

# In these a job stays for ever and has no worker.
FINAL_STATES = frozenset(("completed", "succeeded", "failed", "expired", "cancelled"))

Level = Literal["info", "warn", "error"]
_TABLE = tables.jobs
# How far the clocks of several servers on one database may be apart.
MOST_SKEW_S = 300


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was read. Times in microseconds since 1970.

    ``payload`` is what was asked for, ``result`` how far it came.
    """

    id: str
    project_id: str
    organisation_id: str
    user_id: str | None
    api_key_id: str | None
    rights: dict[str, Any]
    kind: str
    state: str
    payload: dict[str, Any]
    result: dict[str, Any]
    attempt: int
    lease_owner: str | None
    lease_until: int | None
    created_at: int
    updated_at: int

    @property
    def actor(self) -> Actor:
        """Whom it works for, with the rights that they had when they asked."""
        scopes: list[Action] | None = self.rights["scopes"]
        models: list[str] | None = self.rights["models"]
        return Actor(
            self.organisation_id,
            self.project_id,
            self.user_id,
            self.api_key_id,
            self.rights["role"],
            None if scopes is None else frozenset(scopes),
            None if models is None else frozenset(models),
        )


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happened to a job. ``position`` counts a job's events from 0."""

    id: str
    job_id: str
    position: int
    level: Level
    type: str
    message: str
    data: dict[str, Any] | None
    created_at: int


# What is done with the job as it is made or moved, in the same transaction; it may refuse that by raising.
Also = Callable[[Connection, Job], None]


class Jobs:
    """All jobs. What a tenant asks names its :class:`Actor`; what a worker does names the :class:`Job` it claimed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        actor: Actor,
        kind: str,
        payload: dict[str, Any],
        *,
        prefix: str,
        state: str,
        result: dict[str, Any] | None = None,
        also: Also | None = None,
    ) -> Job:
        """A new job with an id of ``prefix``, to be claimed."""
        rights = {
            "role": actor.role,
            "scopes": None if actor.scopes is None else sorted(actor.scopes),
            "models": None if actor.models is None else sorted(actor.models),
        }
        now = now_us()
        job = Job(
            new_id(prefix),
            actor.project,
            actor.organisation_id,
            actor.user_id,
            actor.key_id,
            rights,
            kind,
            state,
            payload,
            result or {},
            0,
            None,
            None,
            now,
            now,
        )

        def work(connection: Connection) -> None:
            if also is not None:
                also(connection, job)
            connection.execute(insert(_TABLE).values(asdict(job)))

        await self._database.write(work, durable=True)
        return job

    async def get(self, actor: Actor, kind: str, job_id: str) -> Job:
        """A job of the actor's project. Raises :class:`NotFoundError`."""
        return await self._database.read(lambda connection: _owned(connection, actor, kind, job_id))

    async def page(
        self, actor: Actor, kind: str, *, limit: int, after: str | None = None, order: Order = "desc"
    ) -> Listing[Job]:
        """The project's jobs of one kind, the newest first. Raises :class:`CursorError`."""
        query = _of_project(actor, kind)

        def work(connection: Connection) -> Listing[Job]:
            page = page_of(connection, query, _TABLE, limit=limit, after=after, order=order)
            return Listing([Job(*tuple(row)) for row in page.items], page.has_more)

        return await self._database.read(work)

    async def change(
        self,
        actor: Actor,
        kind: str,
        job_id: str,
        from_states: Collection[str],
        to_state: str,
        result: dict[str, Any] | None = None,
        also: Also | None = None,
    ) -> Job:
        """Move a job because its tenant asks for it (cancel, pause, resume), whoever is at work on it.

        Raises :class:`NotFoundError`, and :class:`ConflictError` for a job in another state.
        """

        def work(connection: Connection) -> Job:
            job = _owned(connection, actor, kind, job_id, lock=True)
            return _moved(connection, job, from_states, to_state, result, also)

        return await self._database.write(work)

    async def claim(self, kinds: Mapping[str, Collection[str]], owner: str, lease_s: float) -> Job | None:
        """The oldest job that nobody is at, for ``lease_s`` seconds; None if there is none.

        ``kinds`` names for each kind the states in which there is something to do. ``owner`` is one worker's name,
        never used by another (nor by the same after a restart).
        """

        def work(connection: Connection) -> Job | None:
            now = now_us()
            wanted = [and_(_TABLE.c.kind == kind, _TABLE.c.state.in_(sorted(states))) for kind, states in kinds.items()]
            lease_until = _TABLE.c.lease_until
            free = or_(
                lease_until.is_(None),
                lease_until <= now,
                # Nobody was given that much: the clock has been set back since, and nobody waits for it to come round.
                lease_until > now + _microseconds(lease_s + MOST_SKEW_S),
            )
            query = select(_TABLE).where(or_(*wanted), free).order_by(_TABLE.c.created_at, _TABLE.c.id)
            # Where several processes claim together, each passes over what another is just taking.
            row = connection.execute(query.limit(1).with_for_update(skip_locked=True)).one_or_none()
            if row is None:
                return None
            values = {"lease_owner": owner, "lease_until": now + _microseconds(lease_s), "attempt": row.attempt + 1}
            return _updated(connection, Job(*tuple(row)), values)

        return await self._database.write(work)

    async def renew(self, job: Job, lease_s: float, result: dict[str, Any] | None = None) -> Job:
        """Hold a claimed job for ``lease_s`` seconds from now, and see what its tenant has made of it meanwhile.

        ``result``'s keys are put into the job's. Raises :class:`LeaseLostError`.
        """

        def work(connection: Connection) -> Job:
            held = _held(connection, job)
            values = {"lease_until": now_us() + _microseconds(lease_s), "result": {**held.result, **(result or {})}}
            return _updated(connection, held, values)

        return await self._database.write(work)

    async def record(self, job: Job, result: dict[str, Any]) -> Job:
        """Put ``result``'s keys into the job's. Raises :class:`LeaseLostError`."""

        def work(connection: Connection) -> Job:
            held = _held(connection, job)
            return _updated(connection, held, {"result": {**held.result, **result}})

        return await self._database.write(work)

    async def move(
        self,
        job: Job,
        from_states: Collection[str],
        to_state: str,
        result: dict[str, Any] | None = None,
        also: Also | None = None,
    ) -> Job:
        """A claimed job's next state, with ``result``'s keys put into its own; a final one ends the lease.

        Raises :class:`LeaseLostError`, and :class:`ConflictError` where its tenant moved it elsewhere.
        """

        def work(connection: Connection) -> Job:
            return _moved(connection, _held(connection, job), from_states, to_state, result, also)

        return await self._database.write(work)

    async def release(self, job: Job) -> None:
        """Let another take a claimed job up at once. One that was lost stays whose it is."""

        def work(connection: Connection) -> None:
            connection.execute(
                update(_TABLE)
                .where(_TABLE.c.id == job.id, _TABLE.c.attempt == job.attempt, _TABLE.c.lease_owner == job.lease_owner)
                .values(lease_owner=None, lease_until=None)
            )

        await self._database.write(work)

    async def add_event(
        self,
        job: Job,
        message: str,
        *,
        level: Level = "info",
        type: str = "message",
        data: dict[str, Any] | None = None,
    ) -> JobEvent:
        """Write down what happened, behind all that did before."""
        table = tables.job_events
        event_id, now = new_id("jobevent"), now_us()

        def work(connection: Connection) -> JobEvent:
            # One after another, so that no two take the same position.
            connection.execute(select(_TABLE.c.id).where(_TABLE.c.id == job.id).with_for_update())
            latest = connection.execute(select(func.max(table.c.position)).where(table.c.job_id == job.id)).scalar()
            position = 0 if latest is None else latest + 1
            event = JobEvent(event_id, job.id, position, level, type, storable(message), data, now)
            connection.execute(insert(table).values(asdict(event)))
            return event

        return await self._database.write(work)

    async def events(
        self, actor: Actor, kind: str, job_id: str, *, limit: int, after: str | None = None, order: Order = "desc"
    ) -> Listing[JobEvent]:
        """A job's events, the newest first. Raises :class:`NotFoundError` or :class:`CursorError`."""
        table = tables.job_events

        def work(connection: Connection) -> Listing[JobEvent]:
            job = _owned(connection, actor, kind, job_id)
            query = select(table).where(table.c.job_id == job.id)
            page = page_of(connection, query, table, limit=limit, after=after, order=order, by="position")
            return Listing([JobEvent(*tuple(row)) for row in page.items], page.has_more)

        return await self._database.read(work)


def unfinished(connection: Connection, project_id: str) -> list[Job]:
    """A project's jobs that have not ended, for those who must not take away what a job needs."""
    query = select(_TABLE).where(_TABLE.c.project_id == project_id, _TABLE.c.state.not_in(sorted(FINAL_STATES)))
    return [Job(*tuple(row)) for row in connection.execute(query)]


def cancel_paused(connection: Connection, project_id: str, also: Also) -> None:
    """End a project's jobs that wait for somebody to let them go on, with ``also`` done to each."""
    for job in unfinished(connection, project_id):
        if job.state == "paused":
            _moved(connection, job, ("paused",), "cancelled", {"finished_at": now_us() // 1_000_000}, also)


def count_unfinished(connection: Connection, project_id: str, kind: str) -> int:
    """How many of them are of one kind."""
    here = (_TABLE.c.project_id == project_id, _TABLE.c.kind == kind, _TABLE.c.state.not_in(sorted(FINAL_STATES)))
    return connection.execute(select(func.count()).where(*here)).scalar_one()


def _of_project(actor: Actor, kind: str) -> Select[Any]:
    return select(_TABLE).where(_TABLE.c.project_id == actor.project, _TABLE.c.kind == kind)


def _owned(connection: Connection, actor: Actor, kind: str, job_id: str, *, lock: bool = False) -> Job:
    # Another tenant's job must look like one that does not exist.
    query = _of_project(actor, kind).where(_TABLE.c.id == storable(job_id))
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFoundError("There is no such job.")
    return Job(*tuple(row))


def _held(connection: Connection, job: Job) -> Job:
    """The job as it stands now, locked, if whoever claimed ``job`` still has it. Raises :class:`LeaseLostError`."""
    row: Row[Any] | None = connection.execute(
        select(_TABLE).where(_TABLE.c.id == job.id).with_for_update()
    ).one_or_none()
    if row is None or (row.lease_owner, row.attempt) != (job.lease_owner, job.attempt):
        raise LeaseLostError(f"The job {job.id} is another worker's by now, or has ended.")
    return Job(*tuple(row))


def _moved(
    connection: Connection,
    job: Job,
    from_states: Collection[str],
    to_state: str,
    result: dict[str, Any] | None,
    also: Also | None,
) -> Job:
    if job.state not in from_states:
        raise ConflictError(f"The job {job.id} is {job.state} and cannot become {to_state}.")
    values: dict[str, Any] = {"state": to_state, "result": {**job.result, **(result or {})}}
    if to_state in FINAL_STATES:
        values |= {"lease_owner": None, "lease_until": None}
    moved = _updated(connection, job, values)
    if also is not None:
        also(connection, moved)
    return moved


def _updated(connection: Connection, job: Job, values: dict[str, Any]) -> Job:
    row = connection.execute(
        update(_TABLE).where(_TABLE.c.id == job.id).values(updated_at=now_us(), **values).returning(_TABLE)
    ).one()
    return Job(*tuple(row))


def _microseconds(seconds: float) -> int:
    return int(seconds * 1_000_000)
