"""``GET /v1/models``: what is served, as OpenAI lists it, with vLLM's ``max_model_len``."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from gale.engine.request import Engine
from gale.server.errors import ApiError


def routes(engine: Engine) -> APIRouter:
    """The list and the single model."""
    router = APIRouter(tags=["openai"])
    model = {
        "id": engine.model_id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "gale",
        "max_model_len": engine.context_length,
    }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    # A path, because names such as "Qwen/Qwen3-0.6B" have slashes.
    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        require_model(engine, model_id)
        return model

    return router


def require_model(engine: Engine, model_id: str) -> None:
    """Raises :class:`ApiError` 404 unless ``model_id`` is the model that ``engine`` serves."""
    if model_id != engine.model_id:
        raise ApiError(
            404,
            f"The model `{model_id[:200]}` does not exist. This server has `{engine.model_id}`.",
            code="model_not_found",
            param="model",
        )
