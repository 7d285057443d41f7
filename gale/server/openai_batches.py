"""``/v1/batches``: many requests in a file, answered when there is time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict, StringConstraints
from sqlalchemy import Connection
from starlette.routing import Route

from gale.platform.access import authorize
from gale.platform.jobs import Job
from gale.platform.store import Store
from gale.server import errors
from gale.server.batch_run import now
from gale.server.batch_worker import ACTIVE, KIND, BatchWorker
from gale.server.caller import actor_of
from gale.server.errors import invalid
from gale.server.field_checks import at_most
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, Limit, listed
from gale.server.openai_files import ExpiresAfter

WINDOW_S = 24 * 3600
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/moderations", "/v1/responses")
_TIMES = tuple(
    f"{name}_at" for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
)


class NewBatch(BaseModel):
    """What is to be done."""

    model_config = ConfigDict(strict=True, extra="ignore")

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[
        dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]]
        | None,
        at_most(16),
    ] = None
    output_expires_after: ExpiresAfter | None = None


def endpoints_app(routers: Sequence[APIRouter]) -> tuple[FastAPI, tuple[str, ...]]:
    """An application of the routes that batches may ask, without what stands before them; and which those are."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    errors.install(app)
    there: set[str] = set()
    for router in routers:
        app.include_router(router)
        there |= {route.path for route in router.routes if isinstance(route, Route)}
    return app, tuple(path for path in ENDPOINTS if path in there)


def routes(store: Store, worker: BatchWorker, endpoints: Sequence[str]) -> APIRouter:
    """The four routes."""
    router = APIRouter(prefix="/v1/batches", tags=["batches"])

    @router.post("", openapi_extra=request_schema(NewBatch))
    async def create(request: Request) -> dict[str, Any]:
        actor = actor_of(request)
        authorize(actor, "write")
        authorize(actor, "use")
        body = await read_json(request, NewBatch)
        if body.endpoint not in endpoints:
            raise invalid("endpoint", f"it must be one of {', '.join(endpoints)}")
        files = store.files(actor)

        def check(connection: Connection, job: Job) -> None:
            files.require(connection, body.input_file_id, "batch")

        payload = {
            "input_file_id": body.input_file_id,
            "endpoint": body.endpoint,
            "completion_window": body.completion_window,
            "metadata": body.metadata,
            "output_lasts_s": body.output_expires_after.seconds if body.output_expires_after else None,
            "expires_at": now() + WINDOW_S,
        }
        job = await store.jobs.create(actor, KIND, payload, prefix="batch", state="validating", also=check)
        worker.wake()
        return batch_object(job)

    @router.get("")
    async def page(request: Request, limit: Limit = 20, after: After = None) -> dict[str, Any]:
        authorize(actor_of(request), "read")
        found = await store.jobs.page(actor_of(request), KIND, limit=limit, after=after)
        return listed([batch_object(job) for job in found.items], has_more=found.has_more)

    @router.get("/{batch_id}")
    async def get(batch_id: str, request: Request) -> dict[str, Any]:
        authorize(actor_of(request), "read")
        return batch_object(await store.jobs.get(actor_of(request), KIND, batch_id))

    @router.post("/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
        actor = actor_of(request)
        authorize(actor, "write")
        live = [state for state in ACTIVE if state != "cancelling"]
        job = await store.jobs.change(actor, KIND, batch_id, live, "cancelling", {"cancelling_at": now()})
        worker.wake()
        return batch_object(job)

    return router


def batch_object(job: Job) -> dict[str, Any]:
    """A batch as OpenAI shows it."""
    asked, result = job.payload, job.result
    shown: dict[str, Any] = {
        "id": job.id,
        "object": "batch",
        "endpoint": asked["endpoint"],
        "input_file_id": asked["input_file_id"],
        "completion_window": asked["completion_window"],
        "status": job.state,
        "created_at": job.created_at // 1_000_000,
        "expires_at": asked["expires_at"],
        "metadata": asked["metadata"],
        "request_counts": {name: result.get(name, 0) for name in ("total", "completed", "failed")},
    }
    for name in ("model", "output_file_id", "error_file_id", "usage", *_TIMES):
        if (value := result.get(name)) is not None:
            shown[name] = value
    if faults := result.get("errors"):
        shown["errors"] = {"object": "list", "data": faults}
    return shown
