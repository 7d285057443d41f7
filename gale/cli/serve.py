"""``gale serve``: the API and the chat page on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer

from gale.core import files


def serve(
    model: Annotated[str | None, typer.Option(help="Model folder or name; the built-in model if not given.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; loopback only, as there are no keys yet.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")] = 8000,
    weights: Annotated[
        Literal["bf16", "int8", "int4"],
        typer.Option(help="bf16 as they are; int8 or int4 are rounded and much faster on a CPU."),
    ] = "bf16",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A LoRA adapter to serve under a name of its own; may be repeated."),
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

    adapters = _adapters(adapter or [])
    sock = listen(host, port)
    store = Store.open(db or settings().database_url)
    try:
        from gale.engine.local import LocalEngine
        from gale.registry.models import resolve_model

        engine = LocalEngine.load(resolve_model(model), weights=weights)
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
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


def _adapters(options: list[str]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not (name and equals and folder) or name in adapters:
            raise typer.BadParameter(
                f"{option!r}: give each as NAME=DIR, with names of their own.", param_hint="--adapter"
            )
        adapters[name] = files.resolve(Path(folder))
    return adapters
