"""``gale train dpo``: a chat model learns from preferences without a reward model (Rafailov et al. 2023).

The reward that a model's own log-probabilities imply is ``beta * (log p - log p_reference)``, where the reference is
the model before the first step; DPO is Bradley-Terry on it. With label smoothing it is cDPO (Mitchell 2023), as a
square IPO (Azar et al. 2024).

The reference's log-probabilities are numbers that never change, two a pair. They are computed once, by the model
itself before its first step, for the pairs that the run will read, and kept in the checkpoints: no second model is
held, and a resumed run has the very same numbers.

Shape suffixes: T trained tokens, P pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gale.core.progress import Bar
from gale.model.transformer import Decoder
from gale.train.batches import IGNORED, Batch
from gale.train.loop import run
from gale.train.losses import trained_logprobs, with_router_losses
from gale.train.pairs import PairedRows
from gale.train.parallel import World
from gale.train.recipe import DpoRecipe
from gale.train.stage import Loss, Objective
from gale.train.tuning import ready_pairs, tuned_decoder


def dpo(recipe: DpoRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train ``recipe.base`` on preferences; see :func:`gale.train.loop.run`."""
    data, training, held_out, facts = ready_pairs(recipe)
    objective = DirectPreference(training, held_out, recipe)
    return run(tuned_decoder("dpo", recipe, data, objective, facts), out, resume=resume)


class DirectPreference(Objective[Decoder]):
    """The loss of DPO, cDPO or IPO over pairs; items are pairs."""

    def __init__(self, training: PairedRows, held_out: dict[str, PairedRows], recipe: DpoRecipe) -> None:
        self.training, self.held_out, self.recipe = training, held_out, recipe
        # Per split, the reference's log-probabilities [pairs, 2] by the pairs' places; NaN where nobody will ask.
        self._reference: dict[str, Tensor] = {}

    def begin_step(self, model: Decoder, step: int) -> dict[str, Any]:
        """Before the first step of a run the model is the reference; nothing is to be logged."""
        if not self._reference:
            model.eval()
            with torch.no_grad():
                self._reference = self._measure_reference(model)
            model.train()
        return {}

    def state(self) -> dict[str, Tensor]:
        """The reference's log-probabilities."""
        return {f"reference/{name}": logprobs for name, logprobs in self._reference.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        names = ("train", *self.held_out)
        self._reference = {name: tensors[f"reference/{name}"] for name in names}

    def loss(self, model: Decoder, first_row: int, rows: int) -> Loss:
        """See :meth:`gale.train.stage.Objective.loss`."""
        places = [self.training.place(row) for row in range(first_row, first_row + rows)]
        batch = self.training.batch_of(places)
        summed_P2, tokens_P2 = answer_logprobs(model, batch)
        loss_P, margin_P = self._losses(summed_P2, tokens_P2, self._reference["train"][places])
        chosen_P, rejected_P = summed_P2.detach().unbind(1)
        sums = {
            "accuracy": float((margin_P > 0).sum()),
            "margin": float(margin_P.detach().sum()),
            "chosen_logprob": float(chosen_P.sum()),
            "rejected_logprob": float(rejected_P.sum()),
        }
        total, routers = with_router_losses(loss_P.sum(), model, rows)
        return Loss(total, rows, len(batch.ids_N), sums | routers)

    def describe(self, first_row: int, rows: int) -> str:
        """The documents of these rows."""
        return self.training.describe(first_row, rows)

    def evaluate(self, model: Decoder, world: World) -> dict[str, float]:
        """Loss and accuracy over the first ``evaluate_rows`` pairs of each held-out split; a tie is half a hit."""
        figures: dict[str, float] = {}
        for name, rows in self.held_out.items():
            losses, margins = [], []
            for places in _pieces(self._read_places(rows, self.recipe.evaluate_rows), self.recipe.micro_rows):
                counted = answer_logprobs(model, rows.batch_of(places))
                loss_P, margin_P = self._losses(*counted, self._reference[name][places])
                losses.append(loss_P)
                margins.append(margin_P)
            margin_P = torch.cat(margins)
            figures[name] = float(torch.cat(losses).mean())
            figures[f"{name}_accuracy"] = float((margin_P > 0).double().mean() + (margin_P == 0).double().mean() / 2)
        return figures

    def _losses(self, summed_P2: Tensor, tokens_P2: Tensor, reference_P2: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [P] of each pair, and by how much its chosen answer leads in implied reward [P]."""
        recipe = self.recipe
        ratio_P2 = summed_P2 - reference_P2.to(summed_P2.device)
        if recipe.length_normalised:
            ratio_P2 = ratio_P2 / tokens_P2
        lead_P = ratio_P2[:, 0] - ratio_P2[:, 1]
        if recipe.loss == "ipo":
            loss_P = (lead_P - 1 / (2 * recipe.beta)).square()
        else:
            smoothing = recipe.label_smoothing
            loss_P = -(1 - smoothing) * F.logsigmoid(recipe.beta * lead_P)
            loss_P = loss_P - smoothing * F.logsigmoid(-recipe.beta * lead_P)
        if recipe.sft_weight:
            loss_P = loss_P - recipe.sft_weight * summed_P2[:, 0] / tokens_P2[:, 0]
        return loss_P, recipe.beta * lead_P

    def _measure_reference(self, model: Decoder) -> dict[str, Tensor]:
        recipe = self.recipe
        wanted = {"train": self._read_places(self.training, recipe.steps * recipe.batch_rows)}
        wanted |= {name: self._read_places(rows, recipe.evaluate_rows) for name, rows in self.held_out.items()}
        found: dict[str, Tensor] = {}
        silent = dist.is_initialized() and dist.get_rank() > 0
        with Bar("Reference", sum(map(len, wanted.values())), silent=silent) as bar:
            for name, all_places in wanted.items():
                rows = self.training if name == "train" else self.held_out[name]
                found[name] = torch.full((len(rows), 2), torch.nan)
                # In the pieces in which they will be trained, so that in any number format the first margin is 0.
                for places in _pieces(all_places, recipe.micro_rows):
                    summed_P2, _ = answer_logprobs(model, rows.batch_of(places))
                    found[name][places] = summed_P2.cpu()
                    bar.advance(steps=len(places))
        return found

    @staticmethod
    def _read_places(rows: PairedRows, count: int) -> list[int]:
        """The places of the pairs among the first ``count`` rows, each once."""
        return [rows.place(row) for row in range(min(count, len(rows)))]


def answer_logprobs(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities and token counts of the answers of a batch of pairs, both [P, 2], chosen first; fp32."""
    counts = [int((piece != IGNORED).sum()) for piece in batch.targets_N.split(batch.lengths)]
    answers = trained_logprobs(model, batch).split(counts)
    # Summed one by one, so that an answer's number does not depend on what stands beside it.
    summed = torch.stack([logprobs.sum() for logprobs in answers])
    return summed.view(-1, 2), torch.tensor(counts, device=summed.device).view(-1, 2)


def _pieces(places: list[int], size: int) -> list[list[int]]:
    return [places[low : low + size] for low in range(0, len(places), size)]
