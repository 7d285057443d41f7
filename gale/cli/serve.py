"""``gale serve``: the API and the chat page on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer

from gale.cli.options import DbOption
from gale.core import files

_UPSTREAM, _RAY = "Another server", "Replicas"


def serve(
    model: Annotated[str | None, typer.Option(help="Model folder, GGUF file or name; built-in if not given.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; one that others reach needs keys (`gale admin init`).")
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
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests answered or waiting at once; more are told to come back.")
    ] = 256,
    prefix_cache: Annotated[bool, typer.Option(help="Keep what was read for prompts that begin alike.")] = True,
    ngram_drafts: Annotated[bool, typer.Option(help="Guess ahead from what a text has said before.")] = True,
    draft: Annotated[
        str | None, typer.Option(help="Folder or name of a smaller model of the same vocabulary that guesses ahead.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option(help="Check at the start that the scores given out are the model's.")
    ] = True,
    db: DbOption = None,
    public_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where people reach it, such as https://gale.example.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page that may use the API with a key; may be repeated."),
    ] = None,
    files_dir: Annotated[
        Path | None, typer.Option("--files", metavar="DIR", help="Uploaded files; a folder in GALE_HOME if not given.")
    ] = None,
    files_quota: Annotated[
        float, typer.Option(min=0, metavar="GB", help="How many gigabytes of files a project may keep.")
    ] = 64.0,
    upstream: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Let an OpenAI-compatible server answer.", rich_help_panel=_UPSTREAM),
    ] = None,
    upstream_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its model, where it has several.", rich_help_panel=_UPSTREAM)
    ] = None,
    upstream_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds its key.", rich_help_panel=_UPSTREAM),
    ] = None,
    upstream_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that holds its key.", rich_help_panel=_UPSTREAM)
    ] = None,
    upstream_context: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Its context, where it keeps that secret.", rich_help_panel=_UPSTREAM
        ),
    ] = None,
    train_on_ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Train fine-tuning jobs on the Ray cluster at this address."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run the model on the Ray cluster at this address ('local' starts one here).",
            rich_help_panel=_RAY,
        ),
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="How many times to run the model there.", rich_help_panel=_RAY)
    ] = 1,
    replica_cpus: Annotated[float, typer.Option(min=0.01, help="Processors for each.", rich_help_panel=_RAY)] = 1.0,
    replica_gpus: Annotated[float, typer.Option(min=0, help="Graphics cards for each.", rich_help_panel=_RAY)] = 0.0,
) -> None:
    """Serve the OpenAI-compatible API and the chat page until Ctrl-C."""
    # Imported here, cheap before costly: what is wrong with the port or the database is said before torch is loaded,
    # and the other verbs do not pay for any of it.
    from gale.cli.engines import EngineChoice, opened
    from gale.core.settings import settings
    from gale.platform.files import FileLimits
    from gale.platform.store import Store
    from gale.server.app import create_app
    from gale.server.lifecycle import Lifecycle
    from gale.server.origins import Origins
    from gale.server.page_sign_in import sign_in_url
    from gale.server.process_limits import prepare_process
    from gale.server.runner import address_of, listen, run
    from gale.server.self_test import check_scores

    choice = EngineChoice(
        model,
        weights=weights,
        adapters=_adapters(adapter or []),
        max_requests=max_requests,
        prefix_cache=prefix_cache,
        ngram_drafts=ngram_drafts,
        draft=draft,
        upstream=upstream,
        upstream_model=upstream_model,
        upstream_key_env=upstream_key_env,
        upstream_key_file=upstream_key_file,
        upstream_context=upstream_context,
        ray=ray,
        replicas=replicas,
        replica_cpus=replica_cpus,
        replica_gpus=replica_gpus,
    )
    prepare_process()
    origins = Origins(cors or [], public_url)
    store = Store.open(
        db or settings().database_url,
        exclusive=True,
        files=files_dir and files.resolve(files_dir),
        file_limits=FileLimits(project_bytes=int(files_quota * 1000**3)),
    )
    try:
        sock = listen(host, port, accounts=asyncio.run(store.sessions.accounts_exist()))
        with opened(choice, port=sock.getsockname()[1]) as engine:
            lifecycle = Lifecycle()
            app = create_app(engine, store, lifecycle=lifecycle, origins=origins, training_ray=train_on_ray)
            link = asyncio.run(store.sessions.owner_link())

            def say_ready() -> None:
                print(f"Gale is ready at {address_of(sock, host)} - model {engine.model_id} - Ctrl-C stops", flush=True)
                if link is not None:
                    where = sign_in_url(public_url or address_of(sock, host), link.token)
                    print(f"Make it yours (once, within a day): {where}", flush=True)

            async def serve_and_close() -> None:
                try:
                    if self_test:
                        await check_scores(engine)
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
