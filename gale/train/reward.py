"""``gale train reward``: a decoder learns to score answers from preferences.

The probability that an answer is preferred is the logistic function of how much higher its reward is (Bradley & Terry
1952; Stiennon et al. 2020). Rewards are only ever compared, so their common height is free; a small weight on the
squared sum of a pair's rewards holds it near zero (Eisenstein et al. 2023).

Shape suffixes: N tokens, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gale.model.reward_model import RewardModel
from gale.train.batches import Batch
from gale.train.loop import run
from gale.train.losses import token_values, with_router_losses
from gale.train.pairs import PairedRows
from gale.train.parallel import World
from gale.train.recipe import RewardRecipe
from gale.train.stage import Loss, Objective
from gale.train.tuning import ready_pairs, tuned_reward_model


def reward(recipe: RewardRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a reward model from ``recipe.base``; see :func:`gale.train.loop.run`."""
    data, training, held_out, facts = ready_pairs(recipe)
    objective = BradleyTerry(training, held_out, recipe)
    return run(tuned_reward_model("reward", recipe, data, objective, facts), out, resume=resume)


@dataclass(frozen=True)
class BradleyTerry(Objective[RewardModel]):
    """``-log sigmoid(chosen - rejected - margin)`` over pairs; items are pairs."""

    training: PairedRows
    held_out: dict[str, PairedRows]
    recipe: RewardRecipe

    def loss(self, model: RewardModel, first_row: int, rows: int) -> Loss:
        """See :meth:`gale.train.stage.Objective.loss`."""
        batch = self.training.batch(first_row, rows)
        chosen_P, rejected_P = answer_rewards(model, batch)
        lead_P = chosen_P - rejected_P
        total = -F.logsigmoid(lead_P - self.recipe.margin).sum()
        total = total + self.recipe.centre * (chosen_P + rejected_P).square().sum()
        sums = {
            "accuracy": float((lead_P > 0).sum()),
            "chosen_reward": float(chosen_P.detach().sum()),
            "rejected_reward": float(rejected_P.detach().sum()),
        }
        total, routers = with_router_losses(total, model.trunk, rows)
        return Loss(total, rows, len(batch.ids_N), sums | routers)

    def describe(self, first_row: int, rows: int) -> str:
        """The documents of these rows."""
        return self.training.describe(first_row, rows)

    def evaluate(self, model: RewardModel, world: World) -> dict[str, float]:
        """Loss and accuracy over the first ``evaluate_rows`` pairs of each held-out split; a tie is half a hit."""
        figures: dict[str, float] = {}
        for name, rows in self.held_out.items():
            count = min(self.recipe.evaluate_rows, len(rows))
            leads: list[Tensor] = []
            # Every process computes all pairs: there are few, and none may wait for one that has none left.
            for first in range(0, count, self.recipe.micro_rows):
                chosen_P, rejected_P = answer_rewards(
                    model, rows.batch(first, min(self.recipe.micro_rows, count - first))
                )
                leads.append(chosen_P - rejected_P)
            lead_P = torch.cat(leads)
            figures[name] = float(-F.logsigmoid(lead_P - self.recipe.margin).mean())
            figures[f"{name}_accuracy"] = float((lead_P > 0).double().mean() + (lead_P == 0).double().mean() / 2)
        return figures


def answer_rewards(model: RewardModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rewards [P] of the chosen and of the rejected answers of a batch of pairs: the values at their last tokens."""
    values_N = token_values(model, batch)
    last = torch.tensor(batch.lengths, device=values_N.device).cumsum(0) - 1
    chosen_P, rejected_P = values_N[last].view(-1, 2).unbind(1)
    return chosen_P, rejected_P
