"""``/v1/organization/projects/{id}/rate_limits`` in OpenAI's shape, and ``/v1/organization/budgets``, which is ours.

A project has a limit for each model and one for all of them together, whose id is ``rl-*``. No limit is null, and null
lifts one. Money is in micro-units of the currency that prices are in.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from gale.core.settings import settings
from gale.engine.request import Engine
from gale.platform.access import Actor
from gale.platform.budgets import Budget, BudgetKey
from gale.platform.errors import NotFoundError
from gale.platform.limits import Limit
from gale.platform.scopes import Scope, ScopeKind
from gale.platform.store import Store
from gale.server.caller import actor_of
from gale.server.field_checks import INT64, Parameters, Refused
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, page_of
from gale.server.listing import Limit as PageLimit

_ALL_MODELS = "*"
_NAMES = {
    "max_requests_per_1_minute": "requests_per_minute",
    "max_tokens_per_1_minute": "tokens_per_minute",
    "max_requests_per_1_day": "requests_per_day",
    "max_concurrent_requests": "concurrency",
}
_KINDS: dict[str, ScopeKind] = {"organization": "organisation", "project": "project", "api_key": "key"}

Count = Annotated[int, Field(ge=0, lt=INT64)]


class RateLimitChange(Parameters):
    """What is not named stays as it is."""

    unsupported: ClassVar[Refused] = {
        "max_images_per_1_minute": (),
        "max_audio_megabytes_per_1_minute": (),
        "batch_1_day_max_input_tokens": (),
    }

    max_requests_per_1_minute: Count | None = None
    max_tokens_per_1_minute: Count | None = None
    max_requests_per_1_day: Count | None = None
    max_concurrent_requests: Count | None = None


class BudgetChange(Parameters):
    """A budget of a project or of a key."""

    scope: Literal["organization", "project", "api_key"]
    scope_id: Annotated[str, Field(min_length=1, max_length=200)]
    period: Literal["day", "month", "total"]
    limit_micro: Count


def routes(engine: Engine, store: Store) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1/organization", tags=["organization"])

    @router.get("/projects/{project_id}/rate_limits")
    async def list_limits(
        project_id: str, request: Request, limit: PageLimit = 100, after: After = None
    ) -> dict[str, Any]:
        scope: Scope = ("project", project_id)
        set_up = {each.model: each for each in await store.quotas(actor_of(request)).limits(scope)}
        names = ["", *sorted({*_models(engine, store, actor_of(request)), *set_up} - {""})]
        shown = [_limit_object(set_up.get(name) or Limit(scope, name)) for name in names]
        return page_of(shown, limit=limit, after=after, order="asc")

    # A path, because names such as "Qwen/Qwen3-0.6B" have slashes.
    @router.post(
        "/projects/{project_id}/rate_limits/{rate_limit_id:path}", openapi_extra=request_schema(RateLimitChange)
    )
    async def change_limit(project_id: str, rate_limit_id: str, request: Request) -> dict[str, Any]:
        body = await read_json(request, RateLimitChange)
        quotas, scope = store.quotas(actor_of(request)), ("project", project_id)
        model = rate_limit_id.removeprefix("rl-")
        known = {_ALL_MODELS, *_models(engine, store, actor_of(request))}
        known.update(each.model for each in await quotas.limits(scope))
        if not rate_limit_id.startswith("rl-") or model not in known:
            raise NotFoundError(f"There is no rate limit '{rate_limit_id[:100]}'.")
        values = {ours: getattr(body, name) for name, ours in _NAMES.items() if name in body.model_fields_set}
        return _limit_object(await quotas.limit(scope, "" if model == _ALL_MODELS else model, values))

    @router.get("/budgets")
    async def list_budgets(request: Request, limit: PageLimit = 100, after: After = None) -> dict[str, Any]:
        found = sorted(await store.quotas(actor_of(request)).budgets(), key=lambda budget: budget.key)
        return page_of([_budget_object(each) for each in found], limit=limit, after=after, order="asc")

    @router.post("/budgets", openapi_extra=request_schema(BudgetChange))
    async def change_budget(request: Request) -> dict[str, Any]:
        body = await read_json(request, BudgetChange)
        key = BudgetKey((_KINDS[body.scope], body.scope_id), body.period)
        return _budget_object(await store.quotas(actor_of(request)).budget(key, body.limit_micro))

    @router.delete("/budgets/{budget_id}")
    async def remove_budget(budget_id: str, request: Request) -> dict[str, Any]:
        await store.quotas(actor_of(request)).remove_budget(_budget_key(budget_id))
        return {"id": budget_id, "object": "organization.budget.deleted", "deleted": True}

    return router


def _models(engine: Engine, store: Store, actor: Actor) -> list[str]:
    """What a project's rate limits can be for; the administrator sees all that there is."""
    return [name for name in (engine.model_id, *engine.adapters) if store.metering.visible(actor, name)]


def _limit_object(limit: Limit) -> dict[str, Any]:
    name = limit.model or _ALL_MODELS
    values = {shown: limit.values[ours] for shown, ours in _NAMES.items()}
    return {"object": "project.rate_limit", "id": f"rl-{name}", "model": name, **values}


def _budget_object(budget: Budget) -> dict[str, Any]:
    scope = next(name for name, kind in _KINDS.items() if kind == budget.key.scope[0])
    return {
        "id": f"{scope}:{budget.key.scope[1]}:{budget.key.period}",
        "object": "organization.budget",
        "scope": scope,
        "scope_id": budget.key.scope[1],
        "period": budget.key.period,
        "currency": settings().currency,
        "limit_micro": budget.limit_micro,
        "used_micro": budget.used_micro,
        "held_micro": budget.held_micro,
    }


def _budget_key(budget_id: str) -> BudgetKey:
    scope, _, rest = budget_id.partition(":")
    scope_id, _, period = rest.rpartition(":")
    if scope not in _KINDS or period not in ("day", "month", "total"):
        raise NotFoundError(f"There is no budget '{budget_id[:100]}'.")
    return BudgetKey((_KINDS[scope], scope_id), period)  # type: ignore[arg-type]
