"""``gale serve``: the API and the chat page on this machine."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer


def serve(
    model: Annotated[str | None, typer.Option(help="Model folder or name; the built-in model if not given.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; loopback only, as there are no keys yet.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")] = 8000,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests answered or waiting at once; more are told to come back.")
    ] = 256,
    prefix_cache: Annotated[bool, typer.Option(help="Keep what was read for prompts that begin alike.")] = True,
    ngram_drafts: Annotated[bool, typer.Option(help="Guess ahead from what a text has said before.")] = True,
    draft: Annotated[
        str | None, typer.Option(help="Folder or name of a smaller model of the same vocabulary that guesses ahead.")
    ] = None,
    db: Annotated[str | None, typer.Option(help="Database, as sqlite:///path; one in GALE_HOME if not given.")] = None,
) -> None:
    """Serve the OpenAI-compatible API and the chat page until Ctrl-C."""
    # Imported here, cheap before costly: what is wrong with the port or the database is said before torch is loaded,
    # and the other verbs do not pay for any of it.
    from gale.core.settings import settings
    from gale.platform.store import Store
    from gale.server.app import create_app
    from gale.server.lifecycle import Lifecycle
    from gale.server.runner import address_of, listen, run

    sock = listen(host, port)
    store = Store.open(db or settings().database_url)
    try:
        from gale.engine.local import LocalEngine
        from gale.engine.options import EngineOptions
        from gale.registry.models import resolve_model

        options = EngineOptions(max_unfinished=max_requests, prefix_cache=prefix_cache, ngram_drafts=ngram_drafts)
        engine = LocalEngine.load(resolve_model(model), options, draft=resolve_model(draft) if draft else None)
        lifecycle = Lifecycle()
        app = create_app(engine, store, lifecycle=lifecycle)

        def say_ready() -> None:
            print(f"Gale is ready at {address_of(sock, host)} - model {engine.model_id} - Ctrl-C stops", flush=True)

        async def serve_and_close() -> None:
            try:
                await run(app, sock, lifecycle, say_ready)
            finally:
                await engine.close()

        asyncio.run(serve_and_close())
    finally:
        store.close()
