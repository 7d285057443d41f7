"""The whole HTTP application, put together."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fastapi import APIRouter, FastAPI

from gale import __version__
from gale.assistant.moderation import Moderator
from gale.core.settings import settings
from gale.engine.request import Engine, Reader
from gale.platform.fine_tuned_models import AdapterHost, FineTunedModels
from gale.platform.store import Store
from gale.platform.tuning_supervisor import TuningSupervisor
from gale.server import (
    anthropic_messages,
    decisions,
    errors,
    fine_tuning,
    health,
    metrics,
    openai_batches,
    openai_chat,
    openai_completions,
    openai_conversations,
    openai_embeddings,
    openai_files,
    openai_models,
    openai_moderations,
    openai_responses,
    openai_uploads,
    organization,
    organization_quotas,
    organization_usage,
    page_conversations,
    page_sign_in,
    page_turns,
    rerank,
    static_page,
    tokenize,
)
from gale.server.batch_worker import BatchWorker
from gale.server.caller import Identify
from gale.server.cors import Cors
from gale.server.edge import Edge, EdgeLimits
from gale.server.housekeeping import keep_house
from gale.server.idempotent import Idempotent
from gale.server.in_process import InProcess
from gale.server.lifecycle import Lifecycle
from gale.server.metered import Metered
from gale.server.origins import Origins
from gale.server.sse import StreamLimits

# Where `npm run build` puts the page; part of the wheel.
STATIC = Path(__file__).parent / "static"


def create_app(
    engine: Engine,
    store: Store,
    *,
    static: Path | None = STATIC,
    lifecycle: Lifecycle | None = None,
    edge_limits: EdgeLimits | None = None,
    stream_limits: StreamLimits | None = None,
    origins: Origins | None = None,
    training_ray: str | None = None,
) -> FastAPI:
    """The ASGI application for one engine and one store, both of which the caller opens and closes.

    For loopback addresses only until ``store`` has accounts (see :mod:`gale.server.caller`). A ``lifecycle`` lets the
    caller drain the application before stopping it; ``origins`` says which web pages may use it.
    Fine-tuning jobs train on the Ray cluster at ``training_ray``, if there is one.
    """
    origins, identities = origins or Origins(), store.identities()
    lifecycle = lifecycle or Lifecycle()
    stream_limits = stream_limits or StreamLimits()
    store.metering.watch = counted = metrics.Metrics(engine, store.metering)
    lifecycle.background.append(store.metering.run)
    # Without /docs, which loads its scripts from a foreign host; and without redirects, which would be built from
    # whatever the Host header says.
    app = FastAPI(title="Gale", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.include_router(health.routes(lifecycle))
    answering = _answering(engine, store, lifecycle, stream_limits)
    for router in answering:
        app.include_router(router)
    models, supervisor = _tuning(engine, store, lifecycle, training_ray)
    app.include_router(fine_tuning.routes(engine, store, models, supervisor))
    app.include_router(openai_models.routes(engine))
    app.include_router(openai_conversations.routes(store))
    app.include_router(openai_files.routes(store))
    app.include_router(openai_uploads.routes(store))
    endpoints, paths = openai_batches.endpoints_app(answering)
    worker = BatchWorker(store, InProcess(endpoints))
    app.include_router(openai_batches.routes(store, worker, paths))
    app.include_router(tokenize.routes(engine))
    app.include_router(organization_quotas.routes(engine, store))
    app.include_router(organization_usage.routes(store))
    app.include_router(metrics.routes(counted))
    app.include_router(page_conversations.routes(engine, store))
    app.include_router(page_turns.routes(engine, store, lifecycle, stream_limits))
    app.include_router(organization.routes(store, identities))
    app.include_router(page_sign_in.routes(store, identities, origins))
    page_files = static_page.install(app, static)
    lifecycle.background += [identities.keep_last_use, worker.run, partial(keep_house, store)]
    # The one added last is the outermost.
    app.add_middleware(Idempotent, kept=store.idempotency)
    app.add_middleware(Metered, metering=store.metering)
    app.add_middleware(Identify, identities=identities, origins=origins, page_files=page_files)
    app.add_middleware(Cors, origins=origins)
    app.add_middleware(Edge, lifecycle=lifecycle, limits=edge_limits or EdgeLimits())
    app.add_middleware(metrics.Observed, metrics=counted)
    return app


def _tuning(
    engine: Engine, store: Store, lifecycle: Lifecycle, ray: str | None
) -> tuple[FineTunedModels | None, TuningSupervisor | None]:
    """What trains beside the server and serves the result, where the engine is one that can."""
    if not isinstance(engine, AdapterHost) or engine.folder is None:
        return None, None
    home = settings().home
    models = FineTunedModels(store.database, engine, home)
    store.metering.visible = models.visible

    supervisor = TuningSupervisor(
        store.database, store.jobs, models, home, store.file_folder.path, store.metering, ray=ray
    )
    lifecycle.background.append(supervisor.run)
    return models, supervisor


def _answering(engine: Engine, store: Store, lifecycle: Lifecycle, limits: StreamLimits) -> list[APIRouter]:
    """The routes that ask a model."""
    routers = [
        openai_chat.routes(engine, lifecycle, limits),
        openai_completions.routes(engine, lifecycle, limits),
        openai_responses.routes(engine, store, lifecycle, limits),
        openai_moderations.routes(Moderator(), lifecycle),
        anthropic_messages.routes(engine, lifecycle, limits),
    ]
    if isinstance(engine, Reader):
        routers += [kind.routes(engine, lifecycle) for kind in (openai_embeddings, rerank, decisions)]
    return routers
