"""``/v1/fine_tuning/jobs``: OpenAI's fine-tuning, done by Gale's own trainer beside the server."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter, Request

from gale.assistant.moderation import NAME as MODERATION
from gale.data.graders import Grader, GraderError
from gale.engine.request import Engine
from gale.platform.errors import NotFoundError
from gale.platform.fine_tuned_models import AdapterHost, FineTunedModels
from gale.platform.fine_tuning import Asked, FineTuning
from gale.platform.jobs import Job, JobEvent
from gale.platform.store import Store
from gale.platform.tuning_bill import SO_FAR
from gale.platform.tuning_supervisor import TuningSupervisor
from gale.server.caller import actor_of, engine_of
from gale.server.errors import ApiError, invalid
from gale.server.fine_tuning_schema import FineTuningRequest, SupervisedKnobs
from gale.server.json_body import read_json, request_schema
from gale.server.listing import After, Limit, listed, page_of
from gale.server.openai_models import may_moderate, require_model

_PATH = "/v1/fine_tuning/jobs"


def routes(
    engine: Engine, store: Store, models: FineTunedModels | None, supervisor: TuningSupervisor | None
) -> APIRouter:
    """Jobs, their events and checkpoints. Without a supervisor none can be made: the engine takes no adapters."""
    router = APIRouter(tags=["openai"])

    def jobs(request: Request) -> FineTuning:
        return store.fine_tuning(actor_of(request))

    def look() -> None:
        if supervisor is not None:
            supervisor.look()

    @router.post(_PATH, openapi_extra=request_schema(FineTuningRequest))
    async def create(request: Request) -> dict[str, Any]:
        asked = _asked(await read_json(request, FineTuningRequest), request, engine, models)
        try:
            job = await jobs(request).create(asked)
        except NotFoundError as error:
            named = asked.validation_file if asked.validation_file and asked.validation_file in error.message else None
            param = "validation_file" if named else "training_file"
            raise ApiError(404, error.message, code="not_found", param=param) from error
        look()
        return described(job)

    @router.get(_PATH)
    async def list_jobs(request: Request, limit: Limit = 20, after: After = None) -> dict[str, Any]:
        if any(name.startswith("metadata") for name in request.query_params):
            raise ApiError(400, "Jobs cannot be sought by 'metadata'.", code="unsupported_parameter", param="metadata")
        page = await jobs(request).page(limit=limit, after=after)
        return listed([described(job) for job in page.items], has_more=page.has_more)

    @router.get(_PATH + "/{job_id}")
    async def get_job(job_id: str, request: Request) -> dict[str, Any]:
        return described(await jobs(request).get(job_id))

    @router.post(_PATH + "/{job_id}/cancel")
    async def cancel(job_id: str, request: Request) -> dict[str, Any]:
        job = await jobs(request).cancel(job_id)
        look()
        return described(job)

    @router.post(_PATH + "/{job_id}/pause")
    async def pause(job_id: str, request: Request) -> dict[str, Any]:
        job = await jobs(request).pause(job_id)
        look()
        return described(job)

    @router.post(_PATH + "/{job_id}/resume")
    async def resume(job_id: str, request: Request) -> dict[str, Any]:
        job = await jobs(request).resume(job_id)
        look()
        return described(job)

    @router.get(_PATH + "/{job_id}/events")
    async def events(job_id: str, request: Request, limit: Limit = 20, after: After = None) -> dict[str, Any]:
        page = await jobs(request).events(job_id, limit=limit, after=after)
        return listed([_event(event) for event in page.items], has_more=page.has_more)

    @router.get(_PATH + "/{job_id}/checkpoints")
    async def checkpoints(job_id: str, request: Request, limit: Limit = 10, after: After = None) -> dict[str, Any]:
        job = await jobs(request).get(job_id)
        found = [_checkpoint(job, each) for each in job.result.get("checkpoints", [])]
        return page_of(found, limit=limit, after=after, order="desc")

    @router.delete("/v1/models/{model_id:path}")
    async def delete_model(model_id: str, request: Request) -> dict[str, Any]:
        actor = actor_of(request)
        if models is None or models.find(actor, model_id) is None:
            mine = engine_of(request, engine)
            if model_id != MODERATION or not may_moderate(mine):
                require_model(mine, model_id)  # which says that there is none
            raise ApiError(400, f"`{model_id[:200]}` is not fine-tuned here and cannot be deleted.", param="model")
        await models.delete(actor, model_id)
        return {"id": model_id, "object": "model", "deleted": True}

    return router


def _asked(body: FineTuningRequest, request: Request, engine: Engine, models: FineTunedModels | None) -> Asked:
    """The body as a job. Raises :class:`ApiError`."""
    adapter = require_model(engine_of(request, engine), body.model)
    if models is None or not isinstance(engine, AdapterHost) or engine.folder is None:
        raise ApiError(
            400,
            f"The model `{body.model}` cannot be fine-tuned here: it does not run in this process from a folder.",
            code="model_not_available",
            param="model",
        )
    tuned = models.find(actor_of(request), body.model) if adapter is not None else None
    if adapter is not None and tuned is None:
        raise invalid("model", "only the model itself and what was fine-tuned here can be trained on")
    method = body.method.type if body.method is not None else "supervised"
    knobs, grader = _method(body)
    return Asked(
        model=body.model,
        base=engine.model_id,
        base_folder=str(engine.folder.resolve()),
        adapter=str(tuned.folder) if tuned is not None else None,
        training_file=body.training_file,
        validation_file=body.validation_file,
        method=method,
        hyperparameters=knobs,
        grader=grader,
        seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
        suffix=body.suffix,
        metadata=body.metadata or {},
    )


def _method(body: FineTuningRequest) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The hyperparameters that were given, and the grader if there is one. Raises :class:`ApiError`."""
    method = body.method
    knobs: SupervisedKnobs | None = body.hyperparameters
    grader: dict[str, Any] | None = None
    if method is not None:
        for kind in ("supervised", "dpo", "reinforcement"):
            if kind != method.type and getattr(method, kind) is not None:
                raise invalid(f"method.{kind}", f"the method is '{method.type}'")
        chosen = getattr(method, method.type)
        if knobs is not None and (method.type != "supervised" or (chosen and chosen.hyperparameters)):
            raise invalid("hyperparameters", f"give those of 'method.{method.type}' only")
        knobs = (chosen.hyperparameters if chosen is not None else None) or knobs
        if method.type == "reinforcement":
            if chosen is None:
                param = "method.reinforcement"
                message = f"Missing required parameter: '{param}'."
                raise ApiError(400, message, code="missing_required_parameter", param=param)
            grader = chosen.grader
            try:
                Grader.read(chosen.grader)
            except GraderError as error:
                raise invalid(f"method.reinforcement.grader.{error.param}", error.message) from error
    given = knobs.model_dump(exclude_none=True) if knobs is not None else {}
    # What asks for nothing, see the schema.
    return {key: value for key, value in given.items() if key not in _IDLE}, grader


_IDLE = ("eval_samples", "compute_multiplier", "reasoning_effort")


def described(job: Job) -> dict[str, Any]:
    """OpenAI's job object."""
    asked, result = job.payload, job.result
    knobs = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    knobs |= {**asked["hyperparameters"], **result.get("hyperparameters", {})}
    own = {"n_epochs", "batch_size", "learning_rate_multiplier"}
    own |= {"dpo": {"beta"}, "reinforcement": {"eval_interval"}}.get(asked["method"], set())
    method: dict[str, Any] = {"hyperparameters": {key: value for key, value in knobs.items() if key in own}}
    if asked["grader"] is not None:
        method["grader"] = asked["grader"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at // 1_000_000,
        "finished_at": result.get("finished_at"),
        "model": asked["model"],
        "fine_tuned_model": result.get("fine_tuned_model"),
        "organization_id": job.organisation_id,
        "result_files": [],
        "status": job.state,
        "training_file": asked["training_file"],
        "validation_file": asked["validation_file"],
        "hyperparameters": {key: value for key, value in knobs.items() if key in own - {"beta", "eval_interval"}},
        # Those that are charged, once that is known.
        "trained_tokens": result.get(SO_FAR, 0) if job.state == "cancelled" else result.get("trained_tokens"),
        "error": result.get("error"),
        "seed": asked["seed"],
        "estimated_finish": result.get("estimated_finish") if job.state == "running" else None,
        "integrations": [],
        "metadata": asked["metadata"],
        "method": {"type": asked["method"], asked["method"]: method},
    }


def _event(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at // 1_000_000,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def _checkpoint(job: Job, checkpoint: dict[str, Any]) -> dict[str, Any]:
    metrics = {"step": checkpoint["step"], "train_loss": checkpoint["train_loss"]}
    if "validation" in checkpoint["held_out"]:
        metrics["full_valid_loss"] = checkpoint["held_out"]["validation"]
    return {
        "id": f"ftckpt_{job.id.partition('_')[2]}_{checkpoint['step']}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.result["finished_at"],
        "fine_tuned_model_checkpoint": checkpoint["name"],
        "fine_tuning_job_id": job.id,
        "step_number": checkpoint["step"],
        "metrics": {key: value for key, value in metrics.items() if value is not None},
    }
