"""What a caller may use, on its way to the routes and back: the engine as theirs, and the headers of their limits."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gale.engine.request import Engine
from gale.platform.access import Actor
from gale.platform.admission import Admission, Ticket
from gale.platform.limits import Measure
from gale.platform.metered_engine import MeteredEngine
from gale.platform.metering import Metering

AnyEngine = TypeVar("AnyEngine", bound=Engine)

_MEASURES: tuple[Measure, ...] = ("requests", "tokens")


class Metered:
    """ASGI middleware that adds ``x-ratelimit-...`` to the answers of requests that were limited.

    With a limit on what they used they have the headers, refused or not; others have none.
    """

    def __init__(self, app: ASGIApp, metering: Metering) -> None:
        self._app = app
        self._metering = metering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["metering"] = self._metering

        async def send_on(message: Message) -> None:
            admission: Admission | None = state.get("admission")
            if message["type"] == "http.response.start" and admission is not None:
                _add(MutableHeaders(scope=message), admission)
            await send(message)

        await self._app(scope, receive, send_on)


def engine_for(request: Request, actor: Actor, engine: AnyEngine) -> AnyEngine:
    """``engine`` as ``actor`` may use it for ``request``."""
    metering: Metering = request.state.metering
    metered = metering.engine(actor, engine, **_circumstances(request))
    if isinstance(metered, MeteredEngine):
        request.state.admission = metered.admission
    return metered


async def ticket_for(request: Request, actor: Actor, model: str, kind: str, most: int) -> Ticket:
    """Let ``actor`` use at most ``most`` tokens of a ``model`` that is no engine.

    Raises what :meth:`Admission.begin` does. The ticket is to be ended with what was used.
    """
    metering: Metering = request.state.metering
    request.state.admission = metering.admission(actor, model, **_circumstances(request))
    ticket: Ticket = await request.state.admission.begin(model, kind, None, lambda: most, 0)
    return ticket


def _circumstances(request: Request) -> dict[str, Any]:
    """Whether a batch asks, and the request's name."""
    state = request.state
    return {"batch": bool(getattr(state, "batch", None)), "request_id": getattr(state, "request_id", None)}


def duration(seconds: float) -> str:
    """As OpenAI writes it in these headers: "120ms", "1.5s", "6m0s", "23h59m1s"."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{round(seconds, 1):g}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{rest}s"


def _add(headers: MutableHeaders, admission: Admission) -> None:
    for measure in _MEASURES:
        if (state := admission.state(measure)) is not None:
            headers[f"x-ratelimit-limit-{measure}"] = str(state.limit)
            headers[f"x-ratelimit-remaining-{measure}"] = str(state.remaining)
            headers[f"x-ratelimit-reset-{measure}"] = duration(state.reset_s)
