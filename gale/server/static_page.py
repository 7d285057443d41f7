"""The chat page's files, as Vite builds them: ``index.html``, ``assets/`` with hashed names, and a few beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_MISSING = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Gale</title>
<body style="font: 1rem/1.6 system-ui, sans-serif; max-width: 36rem; margin: 4rem auto; padding: 0 1rem">
<h1>The chat page is not built yet</h1>
<p>The API works; only the page is missing. Build it in Gale's checkout with</p>
<pre>npm --prefix web ci
npm --prefix web run build</pre>
<p>(or <code>make run</code>, which does that first) and start <code>gale serve</code> again.</p>
"""


class _HashedFiles(StaticFiles):
    """Files whose names change with their content and which therefore never grow old."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


def install(app: FastAPI, folder: Path | None) -> list[str]:
    """Serve ``folder`` at ``/`` and ``/c/{id}``; where it is missing, a page that says how to build it.

    Returns the paths of the files that stand beside the page.

    Only files that are there now are served, each at its own path; nothing is made into a path but the name below
    ``/assets``, which StaticFiles keeps inside its folder.
    """
    index = folder / "index.html" if folder else None

    async def page(request: Request) -> Response:
        if index is None or not index.is_file():
            return HTMLResponse(_MISSING, 503)
        # Asked for again each time (cheaply, by ETag), as it names the current assets.
        return FileResponse(index, headers={"cache-control": "no-cache"})

    app.add_route("/", page, include_in_schema=False)
    app.add_route("/c/{conversation_id}", page, include_in_schema=False)
    if folder is None or not folder.is_dir():
        return []
    beside = [file for file in folder.iterdir() if file.is_file() and file.name != "index.html"]
    for file in beside:
        app.add_route(f"/{file.name}", _serve(file), include_in_schema=False)
    if (folder / "assets").is_dir():
        app.mount("/assets", _HashedFiles(directory=folder / "assets"))
    return [f"/{file.name}" for file in beside]


def _serve(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        return FileResponse(file, headers={"cache-control": "no-cache"})

    return serve
