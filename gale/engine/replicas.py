"""The same model many times on a Ray cluster: Ray Serve starts, watches and chooses the replicas, Gale asks them.

The front tokenises and streams, each replica is a :class:`gale.engine.local.LocalEngine` in a process of its own. A
replica that dies takes no accepted request with it: the request is asked again of another one, and what had been said
already is checked word for word and not said twice. That this is possible is why every request has a seed.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from gale.core.errors import GaleError
from gale.core.model_folder import model_name
from gale.core.settings import settings
from gale.engine.local import LocalEngine
from gale.engine.options import EngineOptions
from gale.engine.prompts import Prompts
from gale.engine.request import (
    EngineFailedError,
    EngineOverloadedError,
    Event,
    Finished,
    PromptScores,
    SamplingParams,
    TextDelta,
    Tools,
)
from gale.model.checkpoint import load_tokenizer
from gale.model.config import ModelConfig
from gale.model.quantised import Weights
from gale.text.template import Message

# A request that has outlived so many replicas may be what kills them.
MOST_LOST = 2
_HEALTH_PERIOD_S = 1.0

log = structlog.get_logger()


class Replica:
    """One copy of the model, in an actor of Ray Serve's."""

    def __init__(self, folder: str, options: EngineOptions, weights: Weights) -> None:
        self._engine = LocalEngine.load(Path(folder), options, weights=weights)

    async def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None
    ) -> AsyncGenerator[Event | GaleError, None]:
        """As the engine's, with its errors as last events: Ray would wrap them beyond recognition."""
        events = self._engine.chat(messages, sampling, tools)
        try:
            async for event in events:
                yield event
        except GaleError as error:
            yield error
        finally:
            await events.aclose()

    async def complete(
        self, prompt: list[int], sampling: SamplingParams
    ) -> AsyncGenerator[PromptScores | Event | GaleError, None]:
        """Likewise."""
        events = self._engine.complete(prompt, sampling)
        try:
            async for event in events:
                yield event
        except GaleError as error:
            yield error
        finally:
            await events.aclose()


class ReplicaEngine:
    """Replicas of one model on the Ray cluster that this process has joined. Implements
    :class:`gale.engine.request.Engine`; made by :meth:`start`.
    """

    def __init__(self, handle: Any, name: str, prompts: Prompts, *, model_id: str, context_length: int) -> None:
        self._handle = handle
        self._name = name
        self._prompts = prompts
        self._model_id = model_id
        self._context_length = context_length

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        name: str,
        replicas: int,
        options: EngineOptions | None = None,
        weights: Weights = "bf16",
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> ReplicaEngine:
        """Start ``replicas`` of the model in ``folder``, which every machine of the cluster sees under that path.

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
            handle = serve.run(deployment.bind(str(folder.resolve()), options, weights), name=name, route_prefix=None)
        except BaseException as error:  # interrupted by the one who waited among them
            application = serve.status().applications.get(name)
            told = [each.message for each in application.deployments.values()] if application else []
            serve.delete(name)
            if not isinstance(error, RuntimeError):
                raise
            raise GaleError(
                f"The replicas do not start: {_cause(told or [str(error)])}",
                hint=f"Every machine of the cluster needs Gale, and {folder.resolve()} under that path.",
            ) from error
        return cls(
            handle.options(stream=True),
            name,
            prompts,
            model_id=model_name(folder),
            context_length=config.context_length,
        )

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""
        return self._model_id

    @property
    def adapters(self) -> tuple[str, ...]:
        """None: they are for a model in this process."""
        return ()

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._context_length

    def count_prompt_tokens(self, messages: list[Message], tools: Tools | None = None) -> int:
        """See :meth:`gale.engine.request.Engine.count_prompt_tokens`."""
        return len(self._prompts.encode_chat(messages, tools))

    def encode(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode`."""
        return self._prompts.encode(text)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode_chat`."""
        return self._prompts.encode_chat(messages)

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """See :meth:`gale.engine.request.Engine.token_bytes`."""
        return self._prompts.token_bytes(token, control_tokens=control_tokens)

    def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`gale.engine.request.Engine.chat`."""
        return self._answer(self._handle.chat, sampling, messages, tools=tools)

    def complete(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[PromptScores | Event, None]:
        """See :meth:`gale.engine.request.Engine.complete`."""
        self._prompts.check(prompt)
        return self._answer(self._handle.complete, sampling, prompt)

    async def close(self) -> None:
        """Stop the replicas, and with them all requests."""
        from ray import serve

        await asyncio.to_thread(serve.delete, self._name)

    async def _answer(
        self, method: Any, sampling: SamplingParams, asked: Any, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """The events of one request, from as many replicas as it takes."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError

        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        said: list[PromptScores | Event] = []
        for _ in range(1 + MOST_LOST):
            response = method.remote(asked, sampling, **more)
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
                    if isinstance(event, Finished):
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


def _differ(said: PromptScores | Event, event: PromptScores | Event) -> bool:
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
