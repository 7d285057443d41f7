"""The same model many times on a Ray cluster: Ray Serve starts, watches and chooses the replicas, Gale asks them.

The front tokenises and streams, each replica is a :class:`gale.engine.local.LocalEngine` in a process of its own. A
replica that dies takes no accepted request with it: the request is asked again of another one, and what had been said
already is checked word for word and not said twice. That this is possible is why every request has a seed.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import structlog

from gale.core.errors import GaleError
from gale.core.model_folder import model_name
from gale.core.settings import settings
from gale.engine.local import LocalEngine
from gale.engine.options import EngineOptions
from gale.engine.prompts import Prompts
from gale.engine.request import (
    Decision,
    Embeddings,
    EngineFailedError,
    EngineOverloadedError,
    Event,
    Finished,
    Pooling,
    PromptScores,
    SamplingParams,
    TextDelta,
    Tools,
    UnknownAdapterError,
)
from gale.model.checkpoint import load_tokenizer
from gale.model.config import ModelConfig
from gale.model.quantised import Weights
from gale.text.template import ChatTemplate, Message

Method = Literal["chat", "complete", "embed", "decide"]
Answer = PromptScores | Event | Embeddings | Decision

# A request that has outlived so many replicas may be what kills them.
MOST_LOST = 2
_HEALTH_PERIOD_S = 1.0

log = structlog.get_logger()


class Replica:
    """One copy of the model, in an actor of Ray Serve's."""

    def __init__(
        self, folder: str, options: EngineOptions, weights: Weights, adapters: Mapping[str, str] | None = None
    ) -> None:
        self._engine = LocalEngine.load(Path(folder), options, weights=weights)
        for name, adapter in (adapters or {}).items():
            self._engine.load_adapter(name, Path(adapter))

    async def ask(self, method: Method, *asked: Any, **more: Any) -> AsyncGenerator[Answer | GaleError, None]:
        """What the engine's ``method`` answers, an error of its own as the last event: Ray would wrap it beyond
        recognition."""
        try:
            answer = getattr(self._engine, method)(*asked, **more)
            if inspect.isawaitable(answer):
                yield await answer
                return
            async with aclosing(answer) as events:
                async for event in events:
                    yield event
        except GaleError as error:
            yield error


class ReplicaEngine:
    """Replicas of one model on the Ray cluster that this process has joined. Implements
    :class:`gale.engine.request.Reader`; made by :meth:`start`.

    ``templates`` are the adapters' own, by their names; None is the model's.
    """

    def __init__(
        self,
        handle: Any,
        name: str,
        prompts: Prompts,
        *,
        model_id: str,
        context_length: int,
        embedding_size: int,
        templates: Mapping[str, ChatTemplate | None] | None = None,
    ) -> None:
        self._handle = handle
        self._name = name
        self._prompts = prompts
        self._model_id = model_id
        self._context_length = context_length
        self._embedding_size = embedding_size
        self._templates = dict(templates or {})

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        name: str,
        replicas: int,
        options: EngineOptions | None = None,
        weights: Weights = "bf16",
        adapters: Mapping[str, Path] | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> ReplicaEngine:
        """Start ``replicas`` of the model in ``folder`` with its ``adapters`` by name.

        Every machine of the cluster sees them under those paths.

        Each is given ``cpus`` processors and ``gpus`` graphics cards. ``name`` is this front's among all that use the
        cluster: what one that was killed has left there under its name is cleared away first. Call within
        :func:`gale.core.cluster.joined_ray`.
        Raises :class:`GaleError` for a cluster that is too small and for what keeps a replica from starting.
        """
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise GaleError(
                "Ray Serve is not installed.", hint="Install it with: pip install 'gale-llm[ray]'"
            ) from error

        options = options or EngineOptions()
        config = ModelConfig.load(folder)
        prompts = Prompts(
            load_tokenizer(folder, config),
            vocabulary_size=config.vocabulary_size,
            context_length=config.context_length,
        )
        paths = {adapter: str(path.resolve()) for adapter, path in (adapters or {}).items()}
        templates = {adapter: prompts.of_adapter(Path(path))[0] for adapter, path in paths.items()}
        _require(ray.cluster_resources(), {"CPU": cpus * replicas, "GPU": gpus * replicas})
        deployment = serve.deployment(
            num_replicas=replicas,
            # So many as run at once; the others wait here and not in a replica that may die or be slower than another.
            max_ongoing_requests=options.max_running,
            max_queued_requests=options.max_unfinished,
            health_check_period_s=_HEALTH_PERIOD_S,
            max_constructor_retry_count=1,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=5,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            ray_actor_options={
                "num_cpus": cpus,
                "num_gpus": gpus,
                "runtime_env": {"env_vars": {"GALE_THREADS": str(max(1, int(cpus)))}},
            },
        )(Replica)
        # Without Serve's HTTP server: Gale's own is the front.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if name in serve.status().applications:
            serve.delete(name)
        try:
            bound = deployment.bind(str(folder.resolve()), options, weights, paths)
            handle = serve.run(bound, name=name, route_prefix=None)
        except BaseException as error:  # interrupted by the one who waited among them
            application = serve.status().applications.get(name)
            told = [each.message for each in application.deployments.values()] if application else []
            serve.delete(name)
            if not isinstance(error, RuntimeError):
                raise
            raise GaleError(
                f"The replicas do not start: {_cause(told or [str(error)])}",
                hint=f"Every machine of the cluster needs Gale, and {folder.resolve()} (and adapters) under that path.",
            ) from error
        return cls(
            handle.options(stream=True),
            name,
            prompts,
            model_id=model_name(folder),
            context_length=config.context_length,
            embedding_size=config.hidden_size,
            templates=templates,
        )

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""
        return self._model_id

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that every replica has."""
        return tuple(self._templates)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._context_length

    def count_prompt_tokens(
        self, messages: list[Message], tools: Tools | None = None, *, adapter: str | None = None
    ) -> int:
        """See :meth:`gale.engine.request.Engine.count_prompt_tokens`."""
        template = self._templates.get(adapter) if adapter else None
        return len(self._prompts.encode_chat(messages, tools, template))

    def encode(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode`."""
        return self._prompts.encode(text)

    def encode_chat(self, messages: list[Message], *, adapter: str | None = None) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_chat`."""
        if adapter is not None and adapter not in self._templates:
            raise UnknownAdapterError(adapter)
        return self._prompts.encode_chat(messages, template=self._templates.get(adapter) if adapter else None)

    def encode_text(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_text`."""
        return self._prompts.encode_text(text)

    @property
    def embedding_size(self) -> int:
        """See :meth:`gale.engine.request.Reader.embedding_size`."""
        return self._embedding_size

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """See :meth:`gale.engine.request.Engine.token_bytes`."""
        return self._prompts.token_bytes(token, control_tokens=control_tokens)

    def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`gale.engine.request.Engine.chat`."""
        return self._answer("chat", messages, _seeded(sampling), tools=tools)

    def complete(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[PromptScores | Event, None]:
        """See :meth:`gale.engine.request.Engine.complete`."""
        self._prompts.check(prompt)
        return self._answer("complete", prompt, _seeded(sampling))

    async def embed(
        self,
        inputs: Sequence[str | list[int]],
        *,
        pooling: Pooling | None = None,
        normalise: bool = True,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> Embeddings:
        """See :meth:`gale.engine.request.Reader.embed`. One replica reads all ``inputs``."""
        how = {"pooling": pooling, "normalise": normalise, "dimensions": dimensions, "adapter": adapter}
        async with aclosing(self._answer("embed", list(inputs), **how)) as answers:
            embeddings: Embeddings = await anext(answers)
        return embeddings

    async def decide(self, prompt: list[int], labels: Sequence[str], *, adapter: str | None = None) -> Decision:
        """See :meth:`gale.engine.request.Reader.decide`."""
        async with aclosing(self._answer("decide", prompt, list(labels), adapter=adapter)) as answers:
            decision: Decision = await anext(answers)
        return decision

    async def close(self) -> None:
        """Stop the replicas, and with them all requests."""
        from ray import serve

        await asyncio.to_thread(serve.delete, self._name)

    async def _answer(self, method: Method, *asked: Any, **more: Any) -> AsyncGenerator[Any, None]:
        """The events of one request, from as many replicas as it takes."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError

        said: list[Answer] = []
        for _ in range(1 + MOST_LOST):
            response = self._handle.ask.remote(method, *asked, **more)
            place = 0
            try:
                while True:
                    async with asyncio.timeout(settings().upstream_read_s):
                        event = await anext(response)
                    if isinstance(event, GaleError):
                        raise event
                    if place == len(said):
                        said.append(event)
                        yield event
                    elif _differ(said[place], event):
                        raise EngineFailedError(
                            "A replica was lost while it answered; another one answers differently."
                        )
                    if isinstance(event, Finished | Embeddings | Decision):
                        return
                    place += 1
            except StopAsyncIteration as error:
                raise EngineFailedError("A replica's answer ended without an end.") from error
            except TimeoutError as error:
                raise EngineFailedError("The replicas have been silent for too long.") from error
            except BackPressureError as error:
                raise EngineOverloadedError(
                    "Too many requests are waiting for a replica already; try again later."
                ) from error
            except RayTaskError as error:
                log.exception("replica_failed", error=str(error))
                raise EngineFailedError("The replica failed while answering; the request was not finished.") from error
            except RayError as error:
                log.warning("replica_lost", error=type(error).__name__, events=len(said))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.warning("replica_lost", error="cancelled", events=len(said))  # one that was told to stop
            finally:
                response.cancel()
        raise EngineFailedError(f"{1 + MOST_LOST} replicas were lost while they answered this request.")


def _seeded(sampling: SamplingParams) -> SamplingParams:
    """With a seed, from which every replica makes the same answer."""
    return sampling if sampling.seed is not None else replace(sampling, seed=secrets.randbits(63))


def _differ(said: Answer, event: Answer) -> bool:
    """Whether two answers part here. Scores may differ in their last digits from machine to machine."""
    if isinstance(said, TextDelta) and isinstance(event, TextDelta):
        tokens = [None if each.score is None else each.score.token for each in (said, event)]
        return said.text != event.text or tokens[0] != tokens[1]
    return type(said) is not type(event)


def _require(there: dict[str, float], needed: dict[str, float]) -> None:
    """Raises :class:`GaleError` for what the whole cluster has not; Serve would wait for it for ever."""
    for resource, amount in needed.items():
        if amount > there.get(resource, 0):
            raise GaleError(
                f"The replicas need {amount:g} {resource}s, and the cluster has {there.get(resource, 0):g}.",
                hint="Use fewer --replicas, less for each, or add machines to the cluster.",
            )


def _cause(told: list[str]) -> str:
    """What went wrong in a replica, out of what Serve tells of it, which ends with the replica's traceback."""
    lines = [line for message in told for line in message.splitlines() if line.strip()]
    errors = [line.partition(": ")[2] for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or ["it is not said why"])[-1]
