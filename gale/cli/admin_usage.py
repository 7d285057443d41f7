"""``gale admin quota`` and ``gale admin usage``: what may be used, what it costs, and what was used."""

from __future__ import annotations

import asyncio
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gale.cli.admin_shared import ORGANISATION, JsonOption, OrgOption, opened, owner_of, print_rows, time_text
from gale.cli.options import DbOption
from gale.core.errors import GaleError

if TYPE_CHECKING:
    from gale.platform.quotas import Quotas
    from gale.platform.scopes import Scope
    from gale.platform.store import Store
    from gale.platform.usage_report import Axis

quota = typer.Typer(help="Limits, budgets and prices.", no_args_is_help=True)

_MICRO = 1_000_000

_ProjectOption = Annotated[str | None, typer.Option("--project", metavar="ID", help="Of this project.")]
_KeyOption = Annotated[str | None, typer.Option("--key", metavar="ID", help="Of this key (its id).")]
_CountOption = Annotated[str | None, typer.Option(metavar="N", help="A number, or 'none' to lift it.")]
_AmountOption = Annotated[str, typer.Option(metavar="AMOUNT", help="Money for a million tokens, such as 0.15.")]


@quota.command("show")
def show(
    project: _ProjectOption = None,
    key: _KeyOption = None,
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """The limits and budgets of an organisation, or of one of its projects or keys."""
    scope = _scope(organisation, project, key)

    async def work(quotas: Quotas) -> list[dict[str, Any]]:
        rows = [
            {"what": f"limit: {name.replace('_', ' ')}", "model": limit.model or "all", "most": value, "used": None}
            for limit in await quotas.limits(scope)
            for name, value in limit.values.items()
            if value is not None
        ]
        for budget in await quotas.budgets():
            if budget.key.scope == scope:
                most, used = _money(budget.limit_micro), _money(budget.used_micro)
                rows.append({"what": f"budget: {budget.key.period}", "model": "all", "most": most, "used": used})
        return rows

    print_rows(_with_quotas(db, organisation, work), as_json)


@quota.command("limit")
def limit(
    project: _ProjectOption = None,
    key: _KeyOption = None,
    organisation: OrgOption = ORGANISATION,
    model: Annotated[str, typer.Option(help="One model; all of them together if not given.")] = "",
    requests_per_minute: _CountOption = None,
    tokens_per_minute: _CountOption = None,
    requests_per_day: _CountOption = None,
    concurrency: _CountOption = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Limit what an organisation, or one of its projects or keys, may ask for. A running server follows in seconds."""
    asked = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "requests_per_day": requests_per_day,
        "concurrency": concurrency,
    }
    values = {name: _count(name, value) for name, value in asked.items() if value is not None}
    if not values:
        raise GaleError("Nothing was said to be limited.", hint="For example: --requests-per-minute 60")
    scope = _scope(organisation, project, key)

    async def work(quotas: Quotas) -> dict[str, Any]:
        changed = await quotas.limit(scope, model, values)
        return {"scope": scope[0], "id": scope[1], "model": model or "all", **changed.values}

    print_rows([_with_quotas(db, organisation, work)], as_json, single=True)


@quota.command("budget")
def budget(
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="Money, such as 12.50, or 'none' to remove it.")],
    project: _ProjectOption = None,
    key: _KeyOption = None,
    organisation: OrgOption = ORGANISATION,
    period: Annotated[Literal["day", "month", "total"], typer.Option(help="Until it begins anew, in UTC.")] = "month",
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give an organisation, or one of its projects or keys, a budget. It is never overspent."""
    scope = _scope(organisation, project, key)

    async def work(quotas: Quotas) -> dict[str, Any]:
        from gale.platform.budgets import BudgetKey

        row: dict[str, Any] = {"scope": scope[0], "id": scope[1], "period": period}
        if amount == "none":
            await quotas.remove_budget(BudgetKey(scope, period))
            return {**row, "limit": None}
        made = await quotas.budget(BudgetKey(scope, period), _micro(amount))
        return {**row, "limit": _money(made.limit_micro), "used": _money(made.used_micro)}

    print_rows([_with_quotas(db, organisation, work)], as_json, single=True)


@quota.command("price")
def price(
    model: Annotated[str, typer.Argument(help="Which model, or 'all' for those without a price of their own.")],
    prompt: _AmountOption,
    answer: _AmountOption,
    cached: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Of prompts what was read before; as --prompt if not given.")
    ] = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a million tokens cost. What was used already keeps its price."""
    from gale.platform.prices import Price

    costs = Price(_micro(prompt), _micro(prompt if cached is None else cached), _micro(answer))

    async def work(quotas: Quotas) -> None:
        await quotas.price("" if model == "all" else model, costs)

    _with_quotas(db, ORGANISATION, work)
    row = {"model": model, "prompt": _money(costs.input_micro), "cached": _money(costs.cached_input_micro)}
    print_rows([{**row, "answer": _money(costs.output_micro)}], as_json, single=True)


@quota.command("prices")
def prices(db: DbOption = None, as_json: JsonOption = False) -> None:
    """What a million tokens cost."""

    async def work(quotas: Quotas) -> list[dict[str, Any]]:
        return [
            {
                "model": model or "all",
                "prompt": _money(each.input_micro),
                "cached": _money(each.cached_input_micro),
                "answer": _money(each.output_micro),
            }
            for model, each in sorted((await quotas.prices()).items())
        ]

    print_rows(_with_quotas(db, ORGANISATION, work), as_json)


def usage(
    days: Annotated[int, typer.Option(min=1, max=366, help="How many days back, today among them.")] = 7,
    by: Annotated[
        str, typer.Option(help="What to keep apart: day, project, user, key, model, kind, batch; with commas.")
    ] = "day,model",
    organisation: OrgOption = ORGANISATION,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """What an organisation has used, and what it cost."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    known: dict[str, Axis] = {
        "project": "project_id",
        "user": "user_id",
        "key": "api_key_id",
        "model": "model",
        "kind": "kind",
        "batch": "batch",
    }
    if wrong := [name for name in names if name not in known and name != "day"]:
        raise GaleError(f"{wrong[0]!r} cannot be kept apart.", hint=f"Choose from day, {', '.join(known)}.")

    async def work(store: Store) -> list[dict[str, Any]]:
        from gale.platform.clock import now_us
        from gale.platform.usage_report import WIDTHS, Question

        day = WIDTHS["1d"]
        until = now_us() // day * day + day
        axes = tuple(dict.fromkeys(known[name] for name in names if name != "day"))
        report = store.usage_report(await owner_of(store, organisation))
        sums: dict[tuple[Any, ...], list[int]] = {}
        for used in await report.answer(Question(until - days * day, until, "1d", axes)):
            which = tuple(
                (time_text(used.bucket) or "")[:10] if name == "day" else used.axes[known[name]] for name in names
            )
            counts = [used.requests, used.input_tokens, used.cached_tokens, used.output_tokens, used.cost_micro]
            sums[which] = [a + b for a, b in zip(sums.get(which, [0] * 5), counts, strict=True)]
        return [
            {
                **dict(zip(names, which, strict=True)),
                "requests": counts[0],
                "prompt": counts[1],
                "cached": counts[2],
                "answer": counts[3],
                "cost": _money(counts[4]),
            }
            for which, counts in sums.items()
        ]

    with opened(db) as store:
        rows = asyncio.run(work(store))
    print_rows(rows, as_json)


def _with_quotas(db: str | None, organisation: str, work: Any) -> Any:
    with opened(db) as store:

        async def run() -> Any:
            return await work(store.quotas(await owner_of(store, organisation), operator=True))

        return asyncio.run(run())


def _scope(organisation: str, project: str | None, key: str | None) -> Scope:
    if project and key:
        raise GaleError("A project and a key were given.", hint="Give one of --project and --key.")
    if key:
        return "key", key
    return ("project", project) if project else ("organisation", organisation)


def _count(name: str, text: str) -> int | None:
    if text == "none":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise GaleError(f"--{name.replace('_', '-')} {text!r} is no number.", hint="Give a whole number, or 'none'.")
    return int(text)


def _micro(text: str) -> int:
    """An amount of money in micro-units, exactly. Raises :class:`GaleError`."""
    try:
        micro = Decimal(text) * _MICRO
        if not micro.is_finite() or micro != micro.to_integral_value() or not 0 <= micro < 10**18:
            raise InvalidOperation
    except InvalidOperation as error:
        raise GaleError(
            f"{text!r} is no amount of money.", hint="Give one such as 12.50; six decimals at most."
        ) from error
    return int(micro)


def _money(micro: int) -> str:
    return f"{Decimal(micro) / _MICRO:f}"
