"""What a fine-tuning job may cost, set aside before it trains, and what it has cost, charged as it ends.

Both are done by the transaction that moves the job, so that a kill at any moment leaves either a job that holds what it
may yet cost, or one that has ended, holds nothing and is charged once. The hold is the job's and no process's: servers
come and go while it trains. A trained token costs what a token of a prompt to the base does.
"""

from __future__ import annotations

from sqlalchemy import Connection

from gale.engine.request import Usage
from gale.platform.budgets import charge, hold, release, room_in_all
from gale.platform.clock import now_us
from gale.platform.jobs import Job
from gale.platform.prices import Price, price_of, read_prices
from gale.platform.scopes import scopes_of
from gale.platform.usage import UsageEvent, write_events

USAGE_KIND = "fine_tuning"
# What stands in a job's result: the most tokens it may train, the price of a million of them that held when that was
# set aside, and the tokens trained until now.
MOST, PRICE, SO_FAR = "most_tokens", "price_micro", "tokens_so_far"


def read_price(connection: Connection, base: str) -> int:
    """Micro-units for a million trained tokens over ``base``."""
    return price_of(read_prices(connection), base, "").input_micro


def check_budgets(connection: Connection, job: Job) -> None:
    """Raises :class:`BudgetSpentError` where nothing is left for a job whose tokens nobody has counted yet."""
    if read_price(connection, job.payload["base"]):
        room_in_all(connection, scopes_of(job.actor), 1, now_us())


def set_aside(connection: Connection, job: Job) -> None:
    """Hold the most that ``job`` may cost in every budget it is under. Raises :class:`BudgetSpentError`."""
    hold(connection, job.id, scopes_of(job.actor), _cost(job, job.result[MOST]), now_us())


def settle(connection: Connection, job: Job, tokens: int | None = None) -> None:
    """``job`` has ended: charge the ``tokens`` that it trained, or those it has told of, and free the rest."""
    tokens = job.result.get(SO_FAR, 0) if tokens is None else tokens
    release(connection, job.id)
    if not tokens:
        return
    now = now_us()
    event = UsageEvent(
        id=f"usage_{job.id}",  # one a job, so that not even a mistake could charge it twice
        created_at=now,
        organisation_id=job.organisation_id,
        project_id=job.project_id,
        user_id=job.user_id,
        api_key_id=job.api_key_id,
        model=job.payload["base"],
        kind=USAGE_KIND,
        batch=1,
        requests=1,
        input_tokens=tokens,
        cached_tokens=0,
        output_tokens=0,
        cost_micro=_cost(job, tokens),
        request_id=job.id,
    )
    charge(connection, job.id, write_events(connection, [event]), {}, now)


def _cost(job: Job, tokens: int) -> int:
    return Price(input_micro=job.result.get(PRICE, 0)).cost(Usage(tokens, 0))
