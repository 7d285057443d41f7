"""``GET /metrics``: what the service does, for Prometheus, in a registry of this application's own.

Labels have few values (routes as they are declared, never as they are asked for), so no client can fill the memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gale.engine.request import Engine, Usage, Watched
from gale.platform.access import authorize
from gale.platform.metering import Metering
from gale.server.caller import actor_of
from gale.server.local_guard import asks_from_here

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

# They would be a second line for each, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The counters of one application. Implements :class:`gale.platform.watch.Watch`."""

    def __init__(self, engine: Engine, metering: Metering) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gale_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "gale_request_seconds",
            "From a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge("gale_requests_in_progress", "Requests being answered.", registry=self.registry)
        self.streams = Gauge("gale_open_streams", "Answers being streamed.", registry=self.registry)
        self._tokens = Counter("gale_tokens", "Tokens charged.", ("kind", "of"), registry=self.registry)
        self._first_token = Histogram(
            "gale_first_token_seconds",
            "From a question to the engine to its answer's first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._gap = Histogram(
            "gale_token_gap_seconds", "Between tokens of one answer.", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Engine(engine))
        self.registry.register(_Usage(metering))

    def first_token(self, seconds: float) -> None:
        """See :meth:`Watch.first_token`."""
        self._first_token.observe(seconds)

    def gap(self, seconds: float) -> None:
        """See :meth:`Watch.gap`."""
        self._gap.observe(seconds)

    def used(self, kind: str, usage: Usage) -> None:
        """See :meth:`Watch.used`."""
        self._tokens.labels(kind, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(kind, "cached").inc(usage.cached_tokens)
        self._tokens.labels(kind, "answer").inc(usage.completion_tokens)


class _Engine(Collector):
    """How busy the engine is, asked when somebody wants to know; nothing of one that cannot say."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        if not isinstance(self._engine, Watched):
            return
        stats = self._engine.stats()
        yield _gauge("gale_engine_waiting", "Requests that wait for the engine.", stats.waiting)
        yield _gauge("gale_engine_running", "Requests that the engine answers.", stats.running)
        yield _gauge("gale_engine_cached_tokens", "Tokens held for running requests.", stats.cached_tokens)
        yield _gauge("gale_engine_kept_tokens", "Tokens kept for prompts that begin alike.", stats.kept_tokens)
        yield _gauge("gale_engine_most_cached_tokens", "Tokens that there is room for.", stats.most_cached_tokens)


class _Usage(Collector):
    """Whether usage is written. Alarm on ``gale_usage_failing`` and ``gale_usage_lost_total``."""

    def __init__(self, metering: Metering) -> None:
        self._metering = metering

    def collect(self) -> Iterable[Metric]:
        queue = self._metering.queue
        yield _gauge("gale_usage_waiting", "Usage events not yet in the database.", queue.waiting)
        yield _gauge("gale_usage_spilled", "Those of them that are on disk alone.", queue.waiting - queue.in_memory)
        yield _gauge("gale_usage_failing", "Whether the database took none the last time.", int(queue.failing))
        yield _gauge("gale_usage_full", "Whether what costs a budget is refused for it.", int(queue.full))
        yield _gauge("gale_usage_lost", "Usage events that neither database nor disk took.", queue.lost)


class Observed:
    """ASGI middleware around everything, the edge's own refusals among it, that counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began = self._metrics, time.perf_counter()
        status, streams = 0, False

        async def send_on(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                content_type = Headers(raw=message["headers"]).get("content-type", "")
                if content_type.startswith("text/event-stream"):
                    streams = True
                    metrics.streams.inc()
            await send(message)

        metrics.in_progress.inc()
        try:
            await self._app(scope, receive, send_on)
        finally:
            metrics.in_progress.dec()
            if streams:
                metrics.streams.dec()
            route = getattr(scope.get("route"), "path", "") or "none"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics.requests.labels(route, method, status or "none").inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - began)


def routes(metrics: Metrics) -> APIRouter:
    """The one route, for whoever may administer, and for programs on this machine."""
    router = APIRouter(tags=["health"])

    @router.get("/metrics", response_class=Response)
    async def read(request: Request) -> Response:
        if not asks_from_here(request.scope):
            authorize(actor_of(request), "administer")
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)
