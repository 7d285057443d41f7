"""How much may be spent, and the ledger that keeps to it: what is used, and what is held for what is being answered.

Of each budget ``used + held`` never passes the limit. A process takes money out of a budget in blocks before it needs
it (:func:`take`), hands parts of a block to requests (see :mod:`gale.platform.purses`), and says in the same
transaction as it writes what was used how much of its block that was (:func:`charge`). A job that outlives processes
holds what it may cost under its own name (:func:`hold`). The functions that take a connection run inside of
transactions of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, insert, select, update

from gale.core.errors import GaleError
from gale.platform import tables
from gale.platform.errors import NotFoundError
from gale.platform.scopes import Scope
from gale.platform.usage import UsageEvent

Period = Literal["day", "month", "total"]

# Of what is left of a budget a process takes no more than this part ahead of need, so that others find some too.
_AHEAD = 4


class BudgetSpentError(GaleError):
    """What is left of a budget is too little for the request."""


class BudgetKey(NamedTuple):
    """Whose budget, and how long until it begins anew."""

    scope: Scope
    period: Period


@dataclass(frozen=True, slots=True)
class Budget:
    """Money in micro-units; ``held_micro`` is set aside for answers that are being written."""

    key: BudgetKey
    limit_micro: int
    used_micro: int = 0
    held_micro: int = 0
    began_at: int = 0

    @property
    def room(self) -> int:
        """What may still be set aside."""
        return max(0, self.limit_micro - self.used_micro - self.held_micro)


def period_began(period: Period, now_us: int) -> int:
    """When the day or the month (in UTC) began in which ``now_us`` lies."""
    if period == "total":
        return 0
    now = datetime.fromtimestamp(now_us // 1_000_000, UTC)
    began = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return int((began if period == "day" else began.replace(day=1)).timestamp()) * 1_000_000


def spent_error(key: BudgetKey, what: str, hint: str) -> BudgetSpentError:
    """Says which budget has too little left for ``what``."""
    kind, name = key.scope
    whole = {"day": "daily budget", "month": "monthly budget", "total": "budget"}[key.period]
    return BudgetSpentError(f"The {whole} of {kind} {name} has too little left for {what}.", hint=hint)


def read_budgets(connection: Connection, now_us: int) -> list[Budget]:
    """All budgets, as they stand at ``now_us``: one whose period is over has begun anew."""
    return [_begun_anew(_budget(row), now_us) for row in connection.execute(select(tables.budgets))]


def set_budget(connection: Connection, key: BudgetKey, limit_micro: int, now_us: int) -> Budget:
    """Make or change a budget; what was used of it in its period stays used."""
    table = tables.budgets
    changed = connection.execute(update(table).where(*_is(table, key)).values(limit_micro=limit_micro))
    if changed.rowcount == 0:
        row = {**_columns(key), "limit_micro": limit_micro, "used_micro": 0, "held_micro": 0}
        connection.execute(insert(table).values(**row, period_began_at=period_began(key.period, now_us)))
    return _current(connection, key, now_us)


def remove_budget(connection: Connection, key: BudgetKey) -> None:
    """Let spend without this budget. Raises :class:`NotFoundError`."""
    connection.execute(delete(tables.holds).where(*_is(tables.holds, key)))
    if connection.execute(delete(tables.budgets).where(*_is(tables.budgets, key))).rowcount == 0:
        raise NotFoundError("There is no such budget.")


def take(connection: Connection, process_id: str, key: BudgetKey, need: int, wish: int, now_us: int) -> tuple[int, int]:
    """Hold ``need`` micro-units or more, up to ``wish``, for a process.

    Returns how much was taken, nothing where ``need`` is not there, and the room that is left. A budget that was
    removed since it was seen gives whatever is wished.
    """
    try:
        budget = _current(connection, key, now_us)
    except NotFoundError:
        return max(need, wish), 0
    amount = max(need, min(wish, budget.room // _AHEAD))
    if amount > budget.room or amount <= 0:
        return 0, budget.room
    _hold(connection, process_id, key, amount)
    return amount, budget.room - amount


def renew(connection: Connection, process_id: str, blocks: Mapping[BudgetKey, int]) -> None:
    """Say that a process lives, and how much it keeps of each budget.

    Where it was taken for dead and its holds are gone, what it keeps is held anew even if there is no room for it: it
    is being spent already.
    """
    holds, processes = tables.holds, tables.processes
    beat = update(processes).where(processes.c.id == process_id).values(beats=processes.c.beats + 1)
    if connection.execute(beat).rowcount == 0:
        connection.execute(insert(processes).values(id=process_id, beats=0))
    for key, kept in blocks.items():
        _hold(connection, process_id, key, kept - _held(connection, process_id, key))
        if not kept:
            connection.execute(delete(holds).where(holds.c.process_id == process_id, *_is(holds, key)))


def bury(connection: Connection, process_id: str, beats: int | None = None) -> None:
    """Free all that a process holds that has ended, or that is dead if its count still stands at ``beats``."""
    processes = tables.processes
    ended = delete(processes).where(processes.c.id == process_id)
    if beats is not None and connection.execute(ended.where(processes.c.beats == beats)).rowcount == 0:
        return
    connection.execute(ended)
    release(connection, process_id)


def room_in_all(connection: Connection, scopes: Iterable[Scope], amount: int, now_us: int) -> list[BudgetKey]:
    """The budgets of ``scopes``, each of which has room for ``amount``; raises :class:`BudgetSpentError` otherwise."""
    table, wanted = tables.budgets, set(scopes)
    near = table.c.scope_id.in_({scope_id for _, scope_id in wanted})
    found = [key for key in map(_key, connection.execute(select(table).where(near)).all()) if key.scope in wanted]
    for key in found:
        if (room := _current(connection, key, now_us).room) < amount:
            what = f"this job, which may cost up to {amount / 1e6:,.6g} where {room / 1e6:,.6g} is left"
            raise spent_error(key, what, "Train on fewer tokens or epochs, or have the budget raised.")
    return found


def hold(connection: Connection, job_id: str, scopes: Iterable[Scope], amount: int, now_us: int) -> None:
    """Set ``amount`` aside for a job in every budget of ``scopes``, until :func:`release`, whichever processes live
    meanwhile. Raises :class:`BudgetSpentError`."""
    for key in room_in_all(connection, scopes, amount, now_us) if amount else ():
        _hold(connection, job_id, key, amount)


def release(connection: Connection, holder_id: str) -> None:
    """Free all that a process or a job holds."""
    holds = tables.holds
    for row in connection.execute(select(holds).where(holds.c.process_id == holder_id)).all():
        _hold(connection, holder_id, _key(row), -row.amount_micro)
    connection.execute(delete(holds).where(holds.c.process_id == holder_id))


def read_processes(connection: Connection) -> dict[str, int]:
    """The beats of every process."""
    return {row.id: row.beats for row in connection.execute(select(tables.processes))}


def charge(
    connection: Connection, process_id: str, events: Iterable[UsageEvent], spent: Mapping[BudgetKey, int], now_us: int
) -> None:
    """Count what was just written as used, of which ``spent`` had been set aside by the process.

    Usage counts for the period in which it is written.
    """
    costs: Counter[Scope] = Counter()
    for event in events:
        if event.cost_micro:
            costs.update(dict.fromkeys(event.scopes, event.cost_micro))
    if not costs:
        return
    table = tables.budgets
    near = table.c.scope_id.in_({scope_id for _, scope_id in costs})
    for key in map(_key, connection.execute(select(table).where(near)).all()):
        if cost := costs[key.scope]:
            _current(connection, key, now_us)
            used = table.c.used_micro + cost
            connection.execute(update(table).where(*_is(table, key)).values(used_micro=used))
        if drawn := min(spent.get(key, 0), _held(connection, process_id, key)):
            _hold(connection, process_id, key, -drawn)


def _held(connection: Connection, process_id: str, key: BudgetKey) -> int:
    table = tables.holds
    query = select(table.c.amount_micro).where(table.c.process_id == process_id, *_is(table, key))
    return connection.scalar(query) or 0


def _hold(connection: Connection, process_id: str, key: BudgetKey, more: int) -> None:
    """Change what a process holds, and with it what is held of the budget."""
    budgets, holds = tables.budgets, tables.holds
    here = (holds.c.process_id == process_id, *_is(holds, key))
    added = holds.c.amount_micro + more
    if connection.execute(update(holds).where(*here).values(amount_micro=added)).rowcount == 0:
        connection.execute(insert(holds).values(process_id=process_id, **_columns(key), amount_micro=more))
    held = budgets.c.held_micro + more
    connection.execute(update(budgets).where(*_is(budgets, key)).values(held_micro=held))


def _current(connection: Connection, key: BudgetKey, now_us: int) -> Budget:
    """A budget as it stands now, begun anew if its period is over. Raises :class:`NotFoundError`."""
    table = tables.budgets
    row = connection.execute(select(table).where(*_is(table, key))).first()
    if row is None:
        raise NotFoundError("There is no such budget.")
    stored = _budget(row)
    budget = _begun_anew(stored, now_us)
    if budget != stored:
        connection.execute(update(table).where(*_is(table, key)).values(used_micro=0, period_began_at=budget.began_at))
    return budget


def _begun_anew(budget: Budget, now_us: int) -> Budget:
    began = period_began(budget.key.period, now_us)
    # Never back: a clock that is set back an hour after midnight would begin the day once more.
    if began <= budget.began_at:
        return budget
    return Budget(budget.key, budget.limit_micro, 0, budget.held_micro, began)


def _budget(row: Row[Any]) -> Budget:
    return Budget(_key(row), row.limit_micro, row.used_micro, row.held_micro, row.period_began_at)


def _key(row: Row[Any]) -> BudgetKey:
    return BudgetKey((row.scope, row.scope_id), row.period)


def _columns(key: BudgetKey) -> dict[str, str]:
    return {"scope": key.scope[0], "scope_id": key.scope[1], "period": key.period}


def _is(table: Table, key: BudgetKey) -> list[ColumnElement[bool]]:
    return [table.c[name] == value for name, value in _columns(key).items()]
