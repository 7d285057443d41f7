"""The same training run on a Ray cluster, through Ray Train: it starts the processes, the loop finds itself among them.

Every worker must see the recipe's files and ``out`` under the same paths: shared storage, as for any cluster training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gale.core.cluster import joined_ray
from gale.core.errors import GaleError
from gale.core.recipe import Recipe

# Takes a recipe, the output folder and whether to resume: what each stage's function is.
Train = Callable[..., dict[str, Any]]


def run_on_ray(
    train: Train, recipe: Recipe, out: Path, *, resume: bool, address: str, workers: int, gpus: bool
) -> dict[str, Any]:
    """Run ``train(recipe, out, resume=resume)`` in ``workers`` processes of the cluster at ``address``.

    Raises what ``train`` raises, and :class:`GaleError` where Ray is not installed or the cluster cannot be reached.
    """

    def worker(config: dict[str, Any]) -> None:
        train(type(recipe).model_validate(config), out, resume=resume)

    with joined_ray(address, show_workers=True):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            worker,
            train_loop_config=recipe.model_dump(mode="json"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
            run_config=RunConfig(name="ray", storage_path=str(out.resolve())),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what a worker raised in an error of its own, several deep
            if (cause := _gale_error(error)) is not None:
                raise cause from error
            raise
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def _gale_error(error: BaseException | None) -> GaleError | None:
    """What a worker raised, where it is an error that a person can act on."""
    if error is None or isinstance(error, GaleError):
        return error
    for failure in (*getattr(error, "worker_failures", {}).values(), error.__cause__, getattr(error, "cause", None)):
        if isinstance(failure, BaseException) and (found := _gale_error(failure)) is not None:
            return found
    return None
