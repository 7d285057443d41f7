"""What a fine-tuning job is, and the recipe that it becomes: OpenAI's few knobs turned into ours.

``auto`` values are derived from the rows and the model, so that a person who knows neither gets a run that works.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gale.data.examples import Examples, Method
from gale.data.graders import Grader
from gale.model.config import ModelConfig
from gale.train.recipe import DpoRecipe, SftRecipe, TuningRecipe
from gale.train.rl_recipe import RlRecipe

# What lies in a job's folder.
JOB, VALIDATED, TRAINED = "job.json", "validated.json", "trained.json"
RUN, ADAPTERS = "run", "adapters"

Auto = Literal["auto"]

KEPT_CHECKPOINTS = 3
_RANK = 16
_ANSWERS_PER_PROMPT = 8
_MOST_ANSWER_TOKENS = 256
_MOST_MICRO_TOKENS = 8192
_MOST_EVALUATED_ROWS = 256


class Hyperparameters(BaseModel):
    """OpenAI's, with its bounds; ``beta`` is DPO's, ``eval_interval`` (steps) reinforcement learning's."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: Auto | int = "auto"
    batch_size: Auto | int = "auto"
    learning_rate_multiplier: Auto | float = "auto"
    beta: Auto | float = "auto"
    eval_interval: Auto | int = "auto"


class TuningJob(BaseModel):
    """All that the process of a job needs to know, kept in its folder.

    ``adapter`` is what a model that was fine-tuned before is trained on from. ``ray`` is the address of a cluster.
    """

    model_config = ConfigDict(extra="forbid")

    method: Method
    base: Path
    adapter: Path | None = None
    training_file: Path
    validation_file: Path | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    grader: dict[str, Any] | None = None
    seed: int = Field(ge=0)
    ray: str | None = None


def settled(job: TuningJob, examples: Examples) -> Hyperparameters:
    """The hyperparameters with every ``auto`` resolved.

    Few rows are read more often and in smaller steps: about 200 steps for 200 rows, 3 epochs for 2,000 and more.
    """
    given, rows = job.hyperparameters, examples.rows
    values: dict[str, Any] = {
        "n_epochs": max(3, min(10, round(2000 / rows))),
        "batch_size": max(4, min(32, rows // 25)),
        "learning_rate_multiplier": 1.0,
        "beta": 0.1,
        "eval_interval": "auto",
    }
    if job.method == "dpo":
        values["n_epochs"] = max(1, min(3, round(1000 / rows)))
    if job.method == "reinforcement":
        values["n_epochs"] = max(1, min(5, round(500 / rows)))
        values["batch_size"] = max(2, min(16, rows // 25))
    asked = {name: value for name, value in given.model_dump().items() if value != "auto"}
    resolved = values | asked
    if resolved["eval_interval"] == "auto":
        resolved["eval_interval"] = max(1, math.ceil(rows / resolved["batch_size"]))  # an epoch
    return Hyperparameters.model_validate(resolved)


def recipe_of(
    job: TuningJob, knobs: Hyperparameters, examples: dict[str, Examples], data: Path
) -> SftRecipe | DpoRecipe | RlRecipe:
    """The recipe of ``job`` over its prepared ``data``; ``knobs`` are settled."""
    training = examples["train"]
    epochs, batch, interval = (_whole(knobs.n_epochs), _whole(knobs.batch_size), _whole(knobs.eval_interval))
    steps = math.ceil(epochs * training.rows / batch)
    config = ModelConfig.load(job.base)
    longest = max(each.longest for each in examples.values())
    common: dict[str, Any] = {
        "base": job.base,
        "steps": steps,
        "seed": job.seed,
        "lora": {"adapter": job.adapter} if job.adapter else {"rank": _RANK, "alpha": 2.0 * _RANK},
        "optimiser": {
            "learning_rate": _learning_rate(config, job.method) * float(knobs.learning_rate_multiplier),
            "warmup_steps": min(10, steps // 10),
            "decay_share": 0.5,
            "weight_decay": 0.0,
            "spike_factor": 0.0,  # rows that are nearly known have gradients of very different size
        },
        "evaluate_every": min(interval, steps),
        "checkpoint_every": math.ceil(steps / 10),
        "keep_checkpoints": KEPT_CHECKPOINTS,
    }
    if "validation" in examples:
        common["evaluate_rows"] = min(_MOST_EVALUATED_ROWS, examples["validation"].rows)
    if job.method == "reinforcement":
        grader = Grader.read(job.grader or {})
        answer_tokens = min(_MOST_ANSWER_TOKENS, config.context_length - longest)
        return RlRecipe.model_validate(
            common
            | {
                "algorithm": "grpo",
                "data": data / "train.jsonl",
                "held_out": data / "validation.jsonl" if "validation" in examples else None,
                "batch_rows": batch * _ANSWERS_PER_PROMPT,
                "micro_rows": _micro(batch * _ANSWERS_PER_PROMPT, longest + answer_tokens),
                "answers_per_prompt": _ANSWERS_PER_PROMPT,
                "row_tokens": longest + answer_tokens,
                "answer_tokens": answer_tokens,
                "reward": {"verifier": grader.verifier, "options": grader.options.model_dump(mode="json")},
            }
        )
    common |= {"data": data, "batch_rows": batch, "micro_rows": _micro(batch, longest), "row_tokens": max(16, longest)}
    kind: type[TuningRecipe] = SftRecipe
    if job.method == "dpo":
        kind, common["beta"] = DpoRecipe, float(knobs.beta)
    recipe = kind.model_validate(common)
    assert isinstance(recipe, SftRecipe | DpoRecipe)
    return recipe


def most_tokens(recipe: SftRecipe | DpoRecipe | RlRecipe, examples: Examples) -> int:
    """The most tokens that ``recipe`` can train, read from ``examples``: exactly those that it does where it ends with
    a whole epoch and is told what to say.

    An epoch reads each row once, both halves of a preference, and each question as often as it is answered.
    """
    rows, answers, longest = recipe.steps * recipe.batch_rows, 1, examples.longest
    if isinstance(recipe, DpoRecipe):
        longest *= 2
    elif isinstance(recipe, RlRecipe):
        answers = recipe.answers_per_prompt
    epochs, more = divmod(rows // answers, examples.rows)
    read = answers * (epochs * examples.tokens + min(more * longest, examples.tokens))
    return read + rows * recipe.answer_tokens if isinstance(recipe, RlRecipe) else read


def _learning_rate(config: ModelConfig, method: Method) -> float:
    """Of adapters: narrow models bear more. Measured at 256 units and usual at 4096, with a line between in logs."""
    rate: float = 2e-4 * (4096 / config.hidden_size) ** 0.9
    return rate if method == "supervised" else rate / 10


def _micro(batch: int, longest: int) -> int:
    """The most rows, of so many tokens at most, that are computed at once."""
    return max(
        rows
        for rows in range(1, batch + 1)
        if batch % rows == 0 and (rows == 1 or rows * longest <= _MOST_MICRO_TOKENS)
    )


def _whole(value: Auto | int) -> int:
    assert value != "auto", "settled before"
    return value
