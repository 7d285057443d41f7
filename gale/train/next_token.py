"""Predicting the next token: the objective of pretraining and of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from gale.core.errors import DataError
from gale.data.shards import TokenSplit, read_manifest
from gale.model.transformer import Decoder
from gale.train.batches import PackedRows, Rows, WholeRows
from gale.train.losses import trained_logprobs, with_router_losses
from gale.train.parallel import World
from gale.train.recipe import StageRecipe
from gale.train.stage import Loss, Objective


@dataclass(frozen=True)
class NextToken(Objective[Decoder]):
    """Cross-entropy in nats over the trained tokens of ``training``; held-out splits are read in the same way.

    A mixture of experts is also trained to keep its routers even and small, as its configuration weighs that; the loss
    that is logged stays the cross-entropy. How even a router is depends on what it sees: one micro-batch at a time.
    """

    training: Rows
    held_out: dict[str, Rows]
    evaluate_rows: int
    micro_rows: int

    def loss(self, model: Decoder, first_row: int, rows: int) -> Loss:
        """See :meth:`gale.train.stage.Objective.loss`."""
        batch = self.training.batch(first_row, rows)
        nats: Tensor = -trained_logprobs(model, batch).sum()
        items = batch.trained_tokens
        nats, routers = with_router_losses(nats, model, items)
        return Loss(nats, items, len(batch.ids_N), routers)

    def describe(self, first_row: int, rows: int) -> str:
        """The documents of these rows."""
        return self.training.describe(first_row, rows)

    def evaluate(self, model: Decoder, world: World) -> dict[str, float]:
        """Mean loss in nats per trained token over the first ``evaluate_rows`` rows of each held-out split."""
        return {name: self._mean_loss(model, rows, world) for name, rows in self.held_out.items()}

    def _mean_loss(self, model: Decoder, rows: Rows, world: World) -> float:
        end, stride = min(self.evaluate_rows, rows.rows_of_epoch(0)), self.micro_rows * world.size
        total, trained = 0.0, 0
        for base in range(0, end, stride):
            first = base + world.rank * self.micro_rows
            # A process without rows of its own computes some all the same: the others wait for its share of weights.
            batch = rows.batch(min(first, end - 1), max(1, min(self.micro_rows, end - first)))
            nats = -trained_logprobs(model, batch).sum()
            if first < end:
                total += float(nats)
                trained += batch.trained_tokens
        total, count = world.sum([total, trained])
        return total / max(1, count)


def next_token(
    recipe: StageRecipe,
    data: Path,
    *,
    loss_on: Literal["all", "trained"],
    long: Literal["split", "cut"],
    packed: bool = True,
) -> NextToken:
    """The objective over prepared data: its split ``train`` is trained on, all others are held out.

    Unless ``packed``, a row is one document with the loss on what is trained of it.
    """

    def rows(name: str) -> Rows:
        split = TokenSplit(data, name)
        if split.pairs:
            raise DataError(
                f"The split {name!r} of {data} holds preferences, half of whose answers are the worse ones.",
                hint="Train on them with `gale train reward` or `gale train dpo`.",
            )
        if not packed:
            return WholeRows(split, seed=recipe.seed)
        return PackedRows(split, row_tokens=recipe.row_tokens, seed=recipe.seed, loss_on=loss_on, long=long)

    held_out = {name: rows(name) for name in read_manifest(data)["splits"] if name != "train"}
    return NextToken(rows("train"), held_out, recipe.evaluate_rows, recipe.micro_rows)
