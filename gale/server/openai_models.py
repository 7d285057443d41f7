"""``GET /v1/models``: what is served, with vLLM's ``max_model_len``, and each adapter as one of its own.

The classifier that moderates stands behind them; ``task`` (ours) says that it answers nothing else.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from gale.assistant.moderation import NAME as MODERATION
from gale.engine.request import Engine
from gale.platform.metered_engine import MeteredEngine
from gale.server.caller import engine_of
from gale.server.errors import ApiError


def routes(engine: Engine) -> APIRouter:
    """The list and the single model."""
    router = APIRouter(tags=["openai"])
    created = int(time.time())

    def describe(name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "gale"}
        if name == MODERATION:
            return {**model, "task": "moderation"}
        model["max_model_len"] = engine.context_length
        return model if name == engine.model_id else {**model, "parent": engine.model_id}

    @router.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        mine = engine_of(request, engine)
        names = (*names_of(mine), *((MODERATION,) if may_moderate(mine) else ()))
        return {"object": "list", "data": [describe(name) for name in names]}

    # A path, because names such as "Qwen/Qwen3-0.6B" have slashes.
    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str, request: Request) -> dict[str, Any]:
        mine = engine_of(request, engine)
        if model_id != MODERATION or not may_moderate(mine):
            require_model(mine, model_id)
        return describe(model_id)

    return router


def may_moderate(engine: Engine) -> bool:
    """Whether the caller whose engine this is may know of the classifier."""
    return not isinstance(engine, MeteredEngine) or engine.admission.may_use(MODERATION)


def names_of(engine: Engine) -> tuple[str, ...]:
    """The models that can be asked for: of a caller's engine those that they may use."""
    return engine.names if isinstance(engine, MeteredEngine) else (engine.model_id, *engine.adapters)


def require_model(engine: Engine, model_id: str) -> str | None:
    """The adapter that ``model_id`` names, None for the model itself. Raises :class:`ApiError` 404 for another name."""
    if model_id in (names := names_of(engine)):
        return None if model_id == engine.model_id else model_id
    served = ", ".join(f"`{name}`" for name in names) or "none for you"
    raise ApiError(
        404,
        f"The model `{model_id[:200]}` does not exist. This server has {served}.",
        code="model_not_found",
        param="model",
    )
