"""Health: ``/healthz`` says that the process runs, ``/readyz`` that it takes requests."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gale.server.lifecycle import Lifecycle


def routes(lifecycle: Lifecycle) -> APIRouter:
    """Both checks; they stay open, need no key and say nothing about the model."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        if lifecycle.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    return router
