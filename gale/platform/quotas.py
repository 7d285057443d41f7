"""Limits and budgets of one organisation, for those who administer it.

What the organisation itself may use, and what things cost, is set by whoever runs this Gale: an organisation cannot
raise its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, select

from gale.platform import tables
from gale.platform.access import Actor, NotAllowedError, authorize
from gale.platform.audit import record
from gale.platform.budgets import Budget, BudgetKey, read_budgets, remove_budget, set_budget
from gale.platform.clock import now_us
from gale.platform.database import Database
from gale.platform.errors import NotFoundError
from gale.platform.limits import Limit, change_limits, limits_of
from gale.platform.metering import Metering
from gale.platform.prices import Price, read_prices, set_price
from gale.platform.scopes import Scope


class Quotas:
    """See above. ``operator`` says that the actor has the machine's shell, and may change the organisation's own too.

    Every change stands in the audit log and holds in this process at once. Raises :class:`NotAllowedError`, and
    :class:`NotFoundError` for what is not of the organisation.
    """

    def __init__(self, database: Database, metering: Metering, actor: Actor, *, operator: bool = False) -> None:
        authorize(actor, "administer")
        self._database = database
        self._metering = metering
        self._actor = actor
        self._operator = operator

    async def limits(self, scope: Scope) -> list[Limit]:
        """The limits of ``scope``, that for all models first."""

        def work(connection: Connection) -> list[Limit]:
            self._check(connection, scope)
            return limits_of(connection, scope)

        return await self._database.read(work)

    async def limit(self, scope: Scope, model: str, values: Mapping[str, int | None]) -> Limit:
        """Set some limits by name ("" is all models together); None lifts one."""
        self._refuse_own(scope)

        def work(connection: Connection) -> Limit:
            self._check(connection, scope)
            details = {"changes_requested": dict(values), **_shown(scope), "model": model}
            record(connection, self._actor, "rate_limit.updated", f"rl-{model or '*'}", details, **_project(scope))
            return change_limits(connection, scope, model, values)

        changed = await self._database.write(work)
        await self._metering.refresh()
        return changed

    async def budgets(self) -> list[Budget]:
        """The organisation's own budgets and those of its projects and keys."""

        def work(connection: Connection) -> list[Budget]:
            own = self._scopes(connection)
            return [each for each in read_budgets(connection, now_us()) if each.key.scope in own]

        return await self._database.read(work)

    async def budget(self, key: BudgetKey, limit_micro: int) -> Budget:
        """Make or change a budget."""
        self._refuse_own(key.scope)

        def work(connection: Connection) -> Budget:
            self._check(connection, key.scope)
            details = {"changes_requested": {"period": key.period, "limit_micro": limit_micro}, **_shown(key.scope)}
            record(connection, self._actor, "budget.updated", None, details, **_project(key.scope))
            return set_budget(connection, key, limit_micro, now_us())

        budget = await self._database.write(work)
        await self._metering.refresh()
        return budget

    async def remove_budget(self, key: BudgetKey) -> None:
        """Let spend without a budget."""
        self._refuse_own(key.scope)

        def work(connection: Connection) -> None:
            self._check(connection, key.scope)
            remove_budget(connection, key)
            details = {"period": key.period, **_shown(key.scope)}
            record(connection, self._actor, "budget.deleted", None, details, **_project(key.scope))

        await self._database.write(work)
        await self._metering.refresh()

    async def prices(self) -> dict[str, Price]:
        """What models cost; "" is for those without a price of their own."""
        return await self._database.read(read_prices)

    async def price(self, model: str, price: Price | None) -> None:
        """Set what a model costs from now on; None forgets it."""
        if not self._operator:
            raise NotAllowedError("Prices are set by whoever runs this Gale.")
        await self._database.write(lambda connection: set_price(connection, model, price))
        await self._metering.refresh()

    def _refuse_own(self, scope: Scope) -> None:
        if scope[0] == "organisation" and not self._operator:
            raise NotAllowedError("What an organisation itself may use is set by whoever runs this Gale.")

    def _check(self, connection: Connection, scope: Scope) -> None:
        if scope not in self._scopes(connection):
            raise NotFoundError(f"There is no {scope[0]} '{scope[1][:100]}'.")

    def _scopes(self, connection: Connection) -> set[Scope]:
        own = self._actor.organisation_id
        projects, keys = tables.projects.c, tables.api_keys.c
        found: set[Scope] = {("organisation", own)}
        mine = select(projects.id).where(projects.organisation_id == own)
        found.update(("project", each) for each in connection.scalars(mine))
        mine = select(keys.id).where(keys.organisation_id == own)
        found.update(("key", each) for each in connection.scalars(mine))
        return found


def _shown(scope: Scope) -> dict[str, str]:
    return {"scope": scope[0], "scope_id": scope[1]}


def _project(scope: Scope) -> dict[str, str]:
    return {"project_id": scope[1]} if scope[0] == "project" else {}
