"""What a stage hands to the one loop: a model, an objective, and how the result is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gale.train.parallel import World
from gale.train.recipe import StageRecipe

ModelType = TypeVar("ModelType", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a few rows, summed over its items, so that sums of pieces are the loss of the whole.

    ``total`` carries the graph. ``items`` is what it is summed over: trained tokens, or pairs. ``tokens`` is how many
    tokens the model computed. ``sums`` are further figures of these rows, summed too; the log shows them per item.
    """

    total: Tensor
    items: int
    tokens: int
    sums: dict[str, float] = field(default_factory=dict)


class Objective(ABC, Generic[ModelType]):
    """What is minimised. Row g of a run is the same whatever was asked before: a resumed run asks from the middle."""

    @abstractmethod
    def loss(self, model: ModelType, first_row: int, rows: int) -> Loss:
        """The loss of rows ``first_row`` to ``first_row + rows`` of the endless sequence of rows."""

    @abstractmethod
    def describe(self, first_row: int, rows: int) -> str:
        """Which documents these rows were made from, for the message when they broke the training."""

    def begin_step(self, model: ModelType, step: int) -> dict[str, Any]:
        """Called before the rows of ``step`` are asked for; returns figures for the log (rollouts happen here)."""
        return {}

    def evaluate(self, model: ModelType, world: World) -> dict[str, float]:
        """Held-out figures by name; called without gradients, by all processes together."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beyond the weights, the optimiser and the number of steps."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""


@dataclass(frozen=True, slots=True)
class Stage(Generic[ModelType]):
    """One training run, ready for :func:`gale.train.loop.run`.

    ``build`` makes the model in the given number format; only its parameters that require gradients are trained.
    ``facts`` must be equal for a resumed run to be the same run (fingerprints of data and base model). ``export``
    writes the finished model into a new folder, in the given number format; ``marker`` is a file in it by which an
    older one is known. ``flops_per_token`` is of one trained token, forward and backward. ``samples`` answers the
    recipe's sample prompts with at most so many tokens each.
    """

    name: str
    recipe: StageRecipe
    data: tuple[Path, ...]
    facts: dict[str, Any]
    build: Callable[[torch.dtype], ModelType]
    objective: Objective[ModelType]
    export: Callable[[ModelType, Path, torch.dtype], None]
    flops_per_token: float
    marker: str = "config.json"
    samples: Callable[[ModelType, Sequence[str], int], list[dict[str, str]]] | None = None
