"""The body of ``POST /v1/fine_tuning/jobs``, field by field, within OpenAI's bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from gale.server.field_checks import Parameters, Refused, at_most

Auto = Literal["auto"]
Epochs = Auto | Annotated[int, Field(ge=1, le=50)]
BatchSize = Auto | Annotated[int, Field(ge=1, le=256)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it must be finite")
    return value


Multiplier = Auto | Annotated[float, Field(gt=0), AfterValidator(_finite)]
Beta = Auto | Annotated[float, Field(gt=0, le=2)]


class _Strict(BaseModel):
    """What is not known within a method is refused: it would change what is trained."""

    model_config = ConfigDict(strict=True, extra="forbid")


class SupervisedKnobs(_Strict):
    """How to train on conversations."""

    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None


class DpoKnobs(SupervisedKnobs):
    """How to train on preferences."""

    beta: Beta | None = None


class ReinforcementKnobs(SupervisedKnobs):
    """How to train on graded answers."""

    eval_interval: Auto | Annotated[int, Field(ge=1)] | None = None
    # Of these only what asks for nothing is taken.
    eval_samples: Auto | Annotated[int, Field(ge=1, le=1)] | None = None
    compute_multiplier: Auto | Annotated[float, Field(ge=1, le=1)] | None = None
    reasoning_effort: Literal["default"] | None = None


class Supervised(_Strict):
    """The method ``supervised``."""

    hyperparameters: SupervisedKnobs | None = None


class Dpo(_Strict):
    """The method ``dpo``."""

    hyperparameters: DpoKnobs | None = None


class Reinforcement(_Strict):
    """The method ``reinforcement``; the grader is read by :mod:`gale.data.graders`."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementKnobs | None = None


class MethodField(_Strict):
    """One of the three, with what belongs to it."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None


class FineTuningRequest(Parameters):
    """The request; ``hyperparameters`` is where the oldest clients put those of the method ``supervised``."""

    unsupported: ClassVar[Refused] = {"integrations": ([],)}
    advice: ClassVar[Mapping[str, str]] = {"integrations": "Metrics are among the job's events."}

    model: str
    training_file: str
    validation_file: str | None = None
    method: MethodField | None = None
    hyperparameters: SupervisedKnobs | None = None
    seed: Seed | None = None
    # Letters, digits and what does not part the name's fields.
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue] | None, at_most(16)] = None
