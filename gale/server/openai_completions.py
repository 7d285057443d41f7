"""``POST /v1/completions``: raw text or tokens continued, with log-probabilities of both where asked for.

What OpenAI calls legacy is what evaluation harnesses measure through: a prompt echoed with the scores of its tokens.
Control tokens that a prompt spells out count as such, since the caller writes the whole of what the model reads.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gale.engine.request import (
    ContextLengthError,
    Engine,
    EngineFailedError,
    Finished,
    PromptError,
    PromptScores,
    SamplingParams,
    TextDelta,
    Usage,
)
from gale.server.caller import engine_of
from gale.server.choices import merged
from gale.server.disconnect import while_wanted
from gale.server.errors import ApiError, invalid
from gale.server.json_body import read_json, request_schema
from gale.server.json_text import json_response, to_json, to_json_aside
from gale.server.lifecycle import Lifecycle
from gale.server.openai_answer import finish_reason
from gale.server.openai_chat import usage_object
from gale.server.openai_completion_schema import MOST_CHOICES, CompletionRequest
from gale.server.openai_logprobs import MOST_SCORES, LogprobLists
from gale.server.openai_models import require_model
from gale.server.openai_sampling import seed_of
from gale.server.sse import EventStream, ServerSentEvent, StreamLimits
from gale.server.tokenize import text_of

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class _Job:
    """One choice to make."""

    index: int
    param: str
    ids: list[int]
    echo: str | None
    sampling: SamplingParams
    as_ids: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one choice; the last one has the reason and the counts."""

    index: int
    text: str
    logprobs: dict[str, list[Any]] | None = None
    reason: str | None = None
    usage: Usage | None = None

    @property
    def choice(self) -> dict[str, Any]:
        return {"index": self.index, "text": self.text, "logprobs": self.logprobs, "finish_reason": self.reason}


def routes(engine: Engine, lifecycle: Lifecycle, limits: StreamLimits) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/completions", response_model=None, openapi_extra=request_schema(CompletionRequest))
    async def create(request: Request) -> Response:
        body = await read_json(request, CompletionRequest)
        metered = engine_of(request, engine)
        jobs = await asyncio.to_thread(_jobs, body, metered)
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        if body.stream:
            chunks = _stream(metered, jobs, head, copies=body.n or 1, include_usage=body.include_usage)
            return EventStream(chunks, lifecycle, limits=limits)
        work = _whole(metered, jobs, head, copies=body.n or 1)
        answered = await while_wanted(request.receive, lifecycle, work)
        return await json_response(answered, long=body.logprobs is not None)

    return router


async def completed(engine: Engine, body: CompletionRequest) -> list[dict[str, Any]]:
    """The choices of a request, as its answer would show them."""
    answer = await _whole(engine, await asyncio.to_thread(_jobs, body, engine), {}, copies=body.n or 1)
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


def _jobs(body: CompletionRequest, engine: Engine) -> list[_Job]:
    """Every choice that is asked for, those of one prompt together. Raises :class:`ApiError` 400 or 404."""
    adapter = require_model(engine, body.model)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "it is only allowed together with 'stream': true")
    copies = body.n or 1
    if copies * len(body.prompt) > MOST_CHOICES:
        raise invalid("n", f"all prompts together may have at most {MOST_CHOICES} choices")
    limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if limit > engine.context_length:
        raise invalid("max_tokens", f"this model writes at most {engine.context_length} tokens")
    sampling = body.sampling(
        stop=body.stop,
        max_tokens=limit,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        adapter=adapter,
    )
    jobs: list[_Job] = []
    as_ids = bool(body.return_tokens_as_token_ids)
    scored = 0
    for place, prompt in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{place}]"
        ids = _encode(engine, prompt, param) if isinstance(prompt, str) else prompt
        _check_length(engine, ids, limit, param)
        scored += copies * (len(ids) * sampling.prompt_logprobs + limit) * (1 + (body.logprobs or 0))
        if body.logprobs is not None and scored > MOST_SCORES:
            raise invalid("logprobs", f"this asks for more than {MOST_SCORES:,} scores; send fewer prompts at once")
        text = prompt if isinstance(prompt, str) else text_of(engine, ids) if body.echo else ""
        for copy in range(copies):
            own = replace(sampling, seed=seed_of(body.seed, copy))
            jobs.append(_Job(len(jobs), param, ids, text if body.echo else None, own, as_ids))
    return jobs


async def _whole(engine: Engine, jobs: list[_Job], head: dict[str, Any], *, copies: int) -> dict[str, Any]:
    choices = [_Piece(job.index, "") for job in jobs]
    pieces = merged(_pieces(engine, job) for job in jobs)
    try:
        async for _, piece in pieces:
            choices[piece.index] = _joined(choices[piece.index], piece)
    finally:
        await pieces.aclose()
    return {**head, "choices": [choice.choice for choice in choices], "usage": _usage(choices, copies)}


async def _stream(
    engine: Engine, jobs: list[_Job], head: dict[str, Any], *, copies: int, include_usage: bool
) -> AsyncGenerator[ServerSentEvent, None]:
    """A chunk for each piece of any choice, then (if asked for) the usage without choices, then ``[DONE]``."""
    if include_usage:
        head = {**head, "usage": None}
    last: list[_Piece] = []
    pieces = merged(_pieces(engine, job) for job in jobs)
    try:
        async for _, piece in pieces:
            if piece.usage is not None:
                last.append(piece)
            chunk = {**head, "choices": [piece.choice]}
            many = piece.logprobs is not None and len(piece.logprobs["tokens"]) > 1  # of a prompt
            yield ServerSentEvent((await to_json_aside(chunk)).decode() if many else to_json(chunk))
    finally:
        await pieces.aclose()
    if include_usage:
        last.sort(key=lambda piece: piece.index)
        yield ServerSentEvent(to_json({**head, "choices": [], "usage": _usage(last, copies)}))
    yield ServerSentEvent("[DONE]")


async def _pieces(engine: Engine, job: _Job) -> AsyncGenerator[_Piece, None]:
    """One choice, piece by piece. Raises :class:`ApiError` 400 for a prompt that the model cannot take."""
    logprobs = None if job.sampling.logprobs is None else LogprobLists(engine, as_ids=job.as_ids)
    try:
        events = engine.complete(job.ids, job.sampling)
    except PromptError as error:
        raise invalid(job.param, error.message) from error
    try:
        if job.echo is not None and logprobs is None:
            yield _Piece(job.index, job.echo)
        async for event in events:
            match event:
                case PromptScores() if logprobs is not None:
                    lists = await asyncio.to_thread(logprobs.lists, event.scores, prompt=True)  # of a long prompt
                    yield _Piece(job.index, job.echo or "", lists)
                case TextDelta():
                    score = [] if event.score is None else [event.score]
                    yield _Piece(job.index, event.text, logprobs.lists(score) if logprobs else None)
                case Finished():
                    yield _Piece(
                        job.index, "", logprobs.lists([]) if logprobs else None, finish_reason(event), event.usage
                    )
                    return
    except ContextLengthError as error:
        raise _too_long(error, job.param) from error
    finally:
        await events.aclose()
    raise EngineFailedError("The model's answer ended without an end.")


def _joined(whole: _Piece, piece: _Piece) -> _Piece:
    logprobs = whole.logprobs
    if piece.logprobs is not None:
        logprobs = logprobs or {}
        for name, values in piece.logprobs.items():
            logprobs.setdefault(name, []).extend(values)
    return _Piece(piece.index, whole.text + piece.text, logprobs, piece.reason, piece.usage)


def _encode(engine: Engine, text: str, param: str) -> list[int]:
    try:
        return engine.encode(text)
    except ContextLengthError as error:
        raise _too_long(error, param) from error


def _check_length(engine: Engine, ids: list[int], max_tokens: int, param: str) -> None:
    """Refuse what the engine would refuse, before anything is done with megabytes of numbers."""
    if len(ids) + (max_tokens > 0) > engine.context_length:
        raise _too_long(ContextLengthError(len(ids), engine.context_length), param)


def _too_long(error: ContextLengthError, param: str) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {error.context_length} tokens, and the prompt has "
        f"{error.prompt_tokens} or more. One place must be left for an answer unless 'max_tokens' is 0.",
        code="context_length_exceeded",
        param=param,
    )


def _usage(choices: list[_Piece], copies: int) -> dict[str, Any]:
    return usage_object([choice.usage for choice in choices if choice.usage is not None], copies)
