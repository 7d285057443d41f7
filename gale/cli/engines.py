"""The engine that ``gale serve`` serves: a model in this process, replicas on a Ray cluster, or another server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gale.core.errors import GaleError

if TYPE_CHECKING:
    from gale.engine.request import Engine
    from gale.model.quantised import Weights

_MOST_KEY_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What was asked for on the command line; at most one of ``upstream`` and ``ray``."""

    model: str | None = None
    weights: Weights = "bf16"
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_requests: int = 256
    prefix_cache: bool = True
    ngram_drafts: bool = True
    draft: str | None = None
    upstream: str | None = None
    upstream_model: str | None = None
    upstream_key_env: str | None = None
    upstream_key_file: Path | None = None
    upstream_context: int | None = None
    ray: str | None = None
    replicas: int = 1
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0


@contextmanager
def opened(choice: EngineChoice, *, port: int) -> Iterator[Engine]:
    """The engine for a server on ``port``; whoever serves it closes it. Raises :class:`GaleError`."""
    if choice.adapters and choice.upstream is not None:
        raise GaleError("--adapter is for a model of this machine; an upstream has its own.")
    if choice.draft is not None and (choice.upstream is not None or choice.ray is not None):
        raise GaleError("--draft is for a model in this process, without --upstream and --ray.")
    if choice.upstream is not None:
        if choice.ray is not None:
            raise GaleError("Give one of --upstream and --ray.")
        if choice.model is not None:
            raise GaleError("--model names a model of this machine.", hint="Use --upstream-model with --upstream.")
        if choice.weights != "bf16":
            raise GaleError("--weights is for a model of this machine; an upstream has its own.")
        from gale.engine.upstream import UpstreamEngine

        yield UpstreamEngine.connect(
            choice.upstream,
            model=choice.upstream_model,
            key=_read_key(choice.upstream_key_env, choice.upstream_key_file),
            context_length=choice.upstream_context,
        )
        return
    from gale.engine.options import EngineOptions
    from gale.registry.models import resolve_model

    options = EngineOptions(
        max_unfinished=choice.max_requests, prefix_cache=choice.prefix_cache, ngram_drafts=choice.ngram_drafts
    )
    if choice.ray is not None:
        from gale.core.cluster import joined_ray
        from gale.engine.replicas import ReplicaEngine

        with joined_ray(choice.ray):
            yield ReplicaEngine.start(
                resolve_model(choice.model),
                name=f"gale-{socket.gethostname()}-{port}",
                options=options,
                weights=choice.weights,
                adapters=choice.adapters,
                replicas=choice.replicas,
                cpus=choice.replica_cpus,
                gpus=choice.replica_gpus,
            )
        return
    from gale.engine.local import LocalEngine

    draft = resolve_model(choice.draft) if choice.draft is not None else None
    engine = LocalEngine.load(resolve_model(choice.model), options, weights=choice.weights, draft=draft)
    for name, folder in choice.adapters.items():
        engine.load_adapter(name, folder)
    yield engine


def _read_key(variable: str | None, file: Path | None) -> str | None:
    """The key from where it was said to be. No message ever holds it."""
    if variable is not None and file is not None:
        raise GaleError("Give one of --upstream-key-env and --upstream-key-file.")
    if variable is not None:
        key, place = os.environ.get(variable, ""), f"the environment variable {variable}"
    elif file is not None:
        try:
            with file.open("rb") as stream:
                key, place = stream.read(_MOST_KEY_BYTES).decode("ascii", "replace"), str(file)
        except OSError as error:
            raise GaleError(f"{file} cannot be read: {error.strerror}.") from error
    else:
        return None
    key = key.strip()
    if not key:
        raise GaleError(f"There is no key in {place}.")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise GaleError(f"What {place} holds is no key: it has spaces or characters that a header cannot carry.")
    return key
