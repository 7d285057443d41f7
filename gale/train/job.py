"""The process of one fine-tuning job: ``python -m gale.train.job validate FOLDER``, then ``... train FOLDER``.

The folder holds ``job.json`` (:class:`gale.train.job_recipe.TuningJob`). Validation leaves ``validated.json`` and the
prepared data, training a run in ``run``, adapters of its last checkpoints in ``adapters/step-N`` and ``trained.json``;
either file holds ``{"error": {"code", "message", "param"}}`` instead where that is how it ended. Both may be killed at
any moment and started again: what is done is not done twice, and training goes on from its last checkpoint.

It ends when its standard input does, so that it never outlives a killed server, which holds the other end.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gale.core import files
from gale.core.device import choose_compute
from gale.core.errors import GaleError
from gale.data.examples import Examples, RowError, prepare_examples, prepare_questions
from gale.data.graders import Grader
from gale.model.adapter_folder import ADAPTER_CONFIG
from gale.model.checkpoint import load_model
from gale.model.config import ModelConfig
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.dpo import dpo
from gale.train.experience import Actor
from gale.train.job_recipe import (
    ADAPTERS,
    JOB,
    RUN,
    TRAINED,
    VALIDATED,
    Hyperparameters,
    TuningJob,
    most_tokens,
    recipe_of,
    settled,
)
from gale.train.on_ray import run_on_ray
from gale.train.optim import MasterWeights
from gale.train.recipe import DpoRecipe, SftRecipe
from gale.train.rl import rl
from gale.train.rl_recipe import RlRecipe
from gale.train.run_log import read_run
from gale.train.sft import sft
from gale.train.tuning import export_adapter, with_adapters

NICENESS = 10
ORPHANED = 3  # exit status of a process whose server is gone


def validate(folder: Path) -> None:
    """Check every row, prepare the data and settle the hyperparameters."""
    _once(folder, VALIDATED, _validate)


def train(folder: Path) -> None:
    """Train, or go on, and write out the adapters."""
    _once(folder, TRAINED, _train)
    # Optimiser states, which nothing needs any more after success; only now, or a process killed in between would begin
    # anew.
    if "error" not in json.loads((folder / TRAINED).read_bytes()):
        shutil.rmtree(folder / RUN / "checkpoints", ignore_errors=True)


def _once(folder: Path, name: str, work: Callable[[Path, TuningJob], dict[str, Any]]) -> None:
    """Leave what ``work`` found, or why it failed, in the file ``name``; one process at a time."""
    with files.locked(folder / "job.lock"):
        if (folder / name).is_file():
            return
        job = TuningJob.model_validate_json((folder / JOB).read_bytes())
        files.write_json(folder / name, work(folder, job))


def _validate(folder: Path, job: TuningJob) -> dict[str, Any]:
    context, sources = ModelConfig.load(job.base).context_length, {"train": ("training_file", job.training_file)}
    if job.validation_file is not None:
        sources["validation"] = ("validation_file", job.validation_file)
    try:
        if job.method == "reinforcement":
            grader = Grader.read(job.grader or {})
            found = prepare_questions(sources, grader, job.base, folder / "data", context=context)
        else:
            found = prepare_examples(job.method, sources, job.base, folder / "data", context=context)
    except RowError as error:
        return _failure(f"invalid_{error.param}", error, error.param)
    except GaleError as error:  # of the base: its folder, its tokenizer
        return _failure("training_failed", error, None)
    knobs = settled(job, found["train"])
    recipe = recipe_of(job, knobs, found, folder / "data")
    return {
        "examples": {split: asdict(each) for split, each in found.items()},
        "hyperparameters": knobs.model_dump(),
        "steps": recipe.steps,
        "most_tokens": most_tokens(recipe, found["train"]),
    }


def _train(folder: Path, job: TuningJob) -> dict[str, Any]:
    validated = json.loads((folder / VALIDATED).read_bytes())
    knobs = Hyperparameters.model_validate(validated["hyperparameters"])
    examples = {split: Examples(**each) for split, each in validated["examples"].items()}
    recipe, out = recipe_of(job, knobs, examples, folder / "data"), folder / RUN
    try:
        _run(recipe, out, job.ray)
    except GaleError as error:
        broken = "broke down" in error.message
        failure = _failure("training_diverged" if broken else "training_failed", error, None)
        return failure | {"checkpoints": _export_checkpoints(recipe, folder), "trained_tokens": _tokens(out)}
    return {"trained_tokens": _tokens(out), "checkpoints": _export_checkpoints(recipe, folder)}


def _run(recipe: SftRecipe | DpoRecipe | RlRecipe, out: Path, ray: str | None) -> None:
    if isinstance(recipe, RlRecipe):  # in one process, see there
        rl(recipe, out, resume=True)
        return
    stage: Callable[..., dict[str, Any]] = (
        dpo if isinstance(recipe, DpoRecipe) else functools.partial(sft, packed=False)
    )
    if ray is None:
        stage(recipe, out, resume=True)
    else:
        run_on_ray(stage, recipe, out, resume=True, address=ray, workers=1, gpus=torch.cuda.is_available())


def _export_checkpoints(recipe: SftRecipe | DpoRecipe | RlRecipe, folder: Path) -> list[dict[str, Any]]:
    """Write the adapters of the checkpoints that are there, and say how good each was."""
    kept = sorted((folder / RUN / "checkpoints").glob("step-*"))
    if not kept:
        return []
    compute = choose_compute(recipe.precision)
    policy = with_adapters(load_model(recipe.base, dtype=compute.dtype), recipe)
    model: nn.Module = Actor(policy, None) if isinstance(recipe, RlRecipe) else policy
    weights, tokenizer = MasterWeights(model, recipe.optimiser), Tokenizer.load(recipe.base)
    rows = {row["step"]: row for row in read_run(folder / RUN).rows}
    exported = []
    for checkpoint in kept:
        step = int(checkpoint.name.removeprefix("step-"))
        tensors = load_file(checkpoint / "state.safetensors")
        _write_adapter(policy, weights, tensors, tokenizer, folder / ADAPTERS / f"step-{step}", recipe.base)
        row = rows.get(step, {})
        exported.append({"step": step, "train_loss": row.get("loss"), "held_out": row.get("held_out") or {}})
    return exported


def _write_adapter(
    policy: Decoder, weights: MasterWeights, tensors: dict[str, Tensor], tokenizer: Tokenizer, out: Path, base: Path
) -> None:
    weights.load_state(tensors)
    weights.refresh(averaged=True)
    with files.new_directory(out, marker=ADAPTER_CONFIG) as folder:
        export_adapter(policy, tokenizer, folder, torch.bfloat16, base)


def _tokens(out: Path) -> int:
    rows = read_run(out).rows
    return int(rows[-1]["tokens"]) if rows else 0


def _failure(code: str, error: GaleError, param: str | None) -> dict[str, Any]:
    message = error.message if error.hint is None else f"{error.message} {error.hint}"
    return {"error": {"code": code, "message": message, "param": param}}


def _end_with_parent() -> None:
    def watch() -> NoReturn:
        while os.read(0, 4096):
            pass
        os._exit(ORPHANED)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """See the module."""
    phase, folder = sys.argv[1], Path(sys.argv[2])
    _end_with_parent()
    os.nice(NICENESS)
    {"validate": validate, "train": train}[phase](folder)


if __name__ == "__main__":
    main()
