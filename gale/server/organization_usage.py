"""``GET /v1/organization/usage/...`` and ``/costs``: what was used and what it cost, in OpenAI's shapes.

Buckets begin where minutes, hours and days begin in UTC. Usage is there about a second after its request has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, get_args

from fastapi import APIRouter, Request

from gale.core.settings import settings
from gale.platform.store import Store
from gale.platform.usage_report import WIDTHS, Axis, Question, Used, Width
from gale.server.caller import actor_of
from gale.server.errors import ApiError, invalid

# What a page has, if nobody says, and at most.
_PAGES: dict[Width, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
_COST_PAGE = (7, 180)
_KINDS = ("completions", "embeddings", "moderations")
_FILTERS: dict[str, Axis] = {
    "project_ids": "project_id",
    "user_ids": "user_id",
    "api_key_ids": "api_key_id",
    "models": "model",
}
_MOST_VALUES = 100
_US = 1_000_000


def routes(store: Store) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1/organization", tags=["organization"])

    def add(kind: str) -> None:
        @router.get(f"/usage/{kind}", name=f"usage of {kind}")
        async def usage(request: Request) -> dict[str, Any]:
            asked = _Asked(request, group_by=("project_id", "user_id", "api_key_id", "model", "batch"))
            width = asked.one("bucket_width", "1d")
            if width not in get_args(Width):
                raise invalid("bucket_width", "it must be one of 1m, 1h and 1d")
            batch = asked.flag("batch") if kind == "completions" else None
            only: dict[Axis, list[Any]] = {"kind": [kind], **({} if batch is None else {"batch": [int(batch)]})}
            return await _page(
                store, request, asked, width, _PAGES[width], only, lambda used: _usage_result(kind, used)
            )

    for kind in _KINDS:
        add(kind)

    @router.get("/costs")
    async def costs(request: Request) -> dict[str, Any]:
        asked = _Asked(request, group_by=("project_id", "api_key_id", "line_item"))
        if asked.one("bucket_width", "1d") != "1d":
            raise invalid("bucket_width", "costs are told day by day: 1d")
        return await _page(store, request, asked, "1d", _COST_PAGE, {}, _cost_result)

    return router


class _Asked:
    """The query of a request. Lists are written as ``name=a&name=b`` or, as OpenAI's client does, ``name[]=a``."""

    def __init__(self, request: Request, *, group_by: tuple[str, ...]) -> None:
        self._query = request.query_params
        known = {"start_time", "end_time", "bucket_width", "limit", "page", "group_by", "batch", *_FILTERS}
        for name in self._query:
            if name.removesuffix("[]") not in known:
                raise ApiError(400, f"Unknown parameter: '{name[:100]}'.", code="unknown_parameter", param=name[:100])
        groups = self.many("group_by")
        if wrong := [name for name in groups if name not in group_by]:
            raise invalid("group_by", f"{wrong[0][:50]!r} is none of {', '.join(group_by)}")
        self.by: tuple[Axis, ...] = tuple(
            dict.fromkeys(axis for name in groups for axis in _axes_of(name))  # in order, each once
        )

    def one(self, name: str, default: str | None = None) -> Any:
        return self._query.get(name) or default

    def many(self, name: str) -> list[str]:
        values = [*self._query.getlist(name), *self._query.getlist(f"{name}[]")]
        found = [value for each in values for value in each.split(",") if value]
        if len(found) > _MOST_VALUES or any("\0" in value for value in found):
            raise invalid(name, f"it may have at most {_MOST_VALUES} values")
        return found

    def flag(self, name: str) -> bool | None:
        value = self._query.get(name)
        if value not in (None, "", "true", "false"):
            raise invalid(name, "it must be true or false")
        return None if not value else value == "true"

    def number(self, name: str, default: int | None, least: int, most: int) -> int:
        value = self._query.get(name)
        if not value:
            if default is None:
                raise ApiError(
                    400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name
                )
            return default
        if not (value.isascii() and value.isdecimal() and len(value) <= 12 and least <= int(value) <= most):
            raise invalid(name, f"it must be a whole number from {least} to {most}")
        return int(value)


async def _page(
    store: Store,
    request: Request,
    asked: _Asked,
    width: Width,
    lengths: tuple[int, int],
    only: dict[Axis, list[Any]],
    result: Any,
) -> dict[str, Any]:
    """One page of buckets, those in which nothing was used among them."""
    step, last = WIDTHS[width], 100_000_000_000
    since = asked.number("start_time", None, 0, last) * _US // step * step
    until = asked.number("end_time", int(time.time()) + 1, 0, last) * _US
    length = asked.number("limit", lengths[0], 1, lengths[1])
    if width == "1m" and since < (time.time() - settings().usage_days * 86_400) * _US:
        reason = f"usage is kept by the minute for {settings().usage_days} days; of earlier ask for 1h or 1d"
        raise invalid("start_time", reason)
    begin = max(since, asked.number("page", 0, 0, last) * _US // step * step)
    end = min(until, begin + length * step)
    filters = {axis: values for name, axis in _FILTERS.items() if (values := asked.many(name))}
    report = store.usage_report(actor_of(request))
    found = await report.answer(Question(begin, end, width, asked.by, {**only, **filters}))
    buckets: dict[int, list[Any]] = {bucket: [] for bucket in range(begin, end, step)}
    for used in found:
        buckets[used.bucket].append(result(used))
    more = end < until
    return {
        "object": "page",
        "data": [
            {"object": "bucket", "start_time": at // _US, "end_time": min(at + step, until) // _US, "results": results}
            for at, results in buckets.items()
        ],
        "has_more": more,
        "next_page": str(end // _US) if more else None,
    }


def _usage_result(kind: str, used: Used) -> dict[str, Any]:
    counts: dict[str, Any] = {"input_tokens": used.input_tokens, "num_model_requests": used.requests}
    axes: Sequence[Axis] = ("project_id", "user_id", "api_key_id", "model")
    if kind == "completions":
        counts |= {
            "output_tokens": used.output_tokens,
            "input_cached_tokens": used.cached_tokens,
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
            "batch": bool(used.axes["batch"]) if "batch" in used.axes else None,
        }
    named: dict[str, Any] = {axis: used.axes.get(axis) or None for axis in axes}
    return {"object": f"organization.usage.{kind}.result", **counts, **named}


def _cost_result(used: Used) -> dict[str, Any]:
    item = f"{used.axes['model']}, {used.axes['kind']}" if "model" in used.axes else None
    return {
        "object": "organization.costs.result",
        "amount": {"value": used.cost_micro / 1_000_000, "currency": settings().currency},
        "line_item": item,
        "project_id": used.axes.get("project_id") or None,
        "api_key_id": used.axes.get("api_key_id") or None,
        "quantity": None,
    }


def _axes_of(group: str) -> tuple[Axis, ...]:
    """A line of a bill is a model and what it was used for."""
    return ("model", "kind") if group == "line_item" else (group,)  # type: ignore[return-value]
