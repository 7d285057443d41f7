"""``gale train classifier``: a decoder learns to give texts labels, and to say how sure it is.

Each label is judged by itself, by the logit at a text's last token; rows that do not know a label teach nothing about
it. When training is done, probabilities are calibrated on rows that it has not seen.

Shape suffixes: N tokens, R texts, L labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gale.core import files
from gale.core.errors import DataError
from gale.core.progress import console
from gale.core.recipe import load_recipe
from gale.model.checkpoint import fingerprint, load_model
from gale.model.classifier import Calibration, Classifier, last_logits, save_classifier
from gale.model.config import ModelConfig
from gale.model.reward_model import RewardModel
from gale.text.tokenizer import Tokenizer
from gale.train.calibration import Floats, calibrate, calibrated, expected_calibration_error
from gale.train.labelled import LabelledData, LabelledRow, LabelledRows, Parts, read_labelled, spread
from gale.train.loop import run
from gale.train.losses import token_values, with_router_losses
from gale.train.parallel import World
from gale.train.recipe import ClassifierRecipe
from gale.train.stage import Loss, Objective, Stage

REPORT = "calibration.json"


def classifier(recipe: ClassifierRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a classifier from ``recipe.base``; see :func:`gale.train.loop.run`."""
    return run(classifier_stage(recipe), out, resume=resume)


def classifier_stage(recipe: ClassifierRecipe) -> Stage[RewardModel]:
    """The stage of a recipe. Raises :class:`DataError` for data that cannot be used."""
    data = load_recipe(recipe.data, LabelledData)
    config, tokenizer = ModelConfig.load(recipe.base), Tokenizer.load(recipe.base)
    if recipe.row_tokens > config.context_length:
        raise DataError(f"row_tokens is {recipe.row_tokens}, but {recipe.base} reads {config.context_length} at most.")
    parts = read_labelled(data, tokenizer, row_tokens=recipe.row_tokens)
    for name, counts in parts.counts.items():
        console.print(f"{name}: {', '.join(f'{count:,} {kind}' for kind, count in counts.items())}", soft_wrap=True)

    def export(model: RewardModel, folder: Path, dtype: torch.dtype) -> None:
        fitted, report = fit(model, data.labels, parts)
        save_classifier(Classifier(model, tokenizer, fitted, window=recipe.row_tokens), folder, dtype=dtype)
        files.write_json(folder / REPORT, report)

    tokens = sum(len(row.ids) for row in parts.training) / len(parts.training)
    idle = 6.0 * config.hidden_size * config.vocabulary_size  # of the output head, which nobody asks
    return Stage(
        name="classifier",
        recipe=recipe,
        data=(),
        facts={
            "data_fingerprint": parts.fingerprint(),
            "base_fingerprint": fingerprint(recipe.base),
            "labels": list(data.labels),
            "rows": {name: len(getattr(parts, name)) for name in ("training", "calibration", "validation")},
            "sources": {source.name: [source.licence, source.origin] for source in data.sources},
        },
        build=lambda dtype: RewardModel.from_decoder(load_model(recipe.base, dtype=dtype), len(data.labels)),
        objective=Labelling(
            LabelledRows(parts.training, seed=recipe.seed), spread(parts.validation, recipe.evaluate_rows), data.labels
        ),
        export=export,
        flops_per_token=config.flops_per_token(math.ceil(tokens)) - idle,
    )


def fit(
    model: RewardModel, labels: tuple[str, ...], parts: Parts
) -> tuple[dict[str, Calibration], dict[str, dict[str, Any]]]:
    """Calibrations fitted on the part for that, and what they are worth on the validation part.

    Raises :class:`DataError` where the calibration part has no row with, or none without, one of the labels.
    """
    logits, right = _logits(model, parts.calibration)
    checked, truth = _logits(model, parts.validation)
    fitted: dict[str, Calibration] = {}
    report: dict[str, dict[str, Any]] = {}
    for place, label in enumerate(labels):
        known, asked = ~np.isnan(right[:, place]), ~np.isnan(truth[:, place])
        fitted[label] = calibrate(logits[known, place], right[known, place] == 1, label=label)
        wanted = truth[asked, place] == 1
        raw, scaled = (calibrated(checked[asked, place], each) for each in (Calibration(1, 0, 0.5), fitted[label]))
        report[label] = {"calibration_rows": int(known.sum()), "validation_rows": int(asked.sum())}
        if asked.any():
            report[label] |= {
                "error_before": round(expected_calibration_error(raw, wanted), 4),
                "error_after": round(expected_calibration_error(scaled, wanted), 4),
            }
    return fitted, report


@dataclass(frozen=True)
class Labelling(Objective[RewardModel]):
    """Binary cross-entropy of every label that is known; items are texts."""

    training: LabelledRows
    validation: list[LabelledRow]
    labels: tuple[str, ...]

    def loss(self, model: RewardModel, first_row: int, rows: int) -> Loss:
        """See :meth:`gale.train.stage.Objective.loss`."""
        batch, labels_RL = self.training.batch(first_row, rows)
        values_NL = token_values(model, batch).view(len(batch.ids_N), -1)
        last_R = torch.tensor(batch.lengths, device=values_NL.device).cumsum(0) - 1
        logits_RL, labels_RL = values_NL[last_R], labels_RL.to(values_NL.device)
        known_RL = ~labels_RL.isnan()
        nats_RL = F.binary_cross_entropy_with_logits(logits_RL, labels_RL.nan_to_num(), reduction="none")
        hits_RL = ((logits_RL > 0) == (labels_RL > 0.5)) & known_RL
        hits = float((hits_RL.sum(1) / known_RL.sum(1).clamp(min=1)).sum())
        total, routers = with_router_losses((nats_RL * known_RL).sum(), model.trunk, rows)
        return Loss(total, rows, len(batch.ids_N), {"accuracy": hits} | routers)

    def describe(self, first_row: int, rows: int) -> str:
        """Where these rows stand in their files."""
        return self.training.describe(first_row, rows)

    def evaluate(self, model: RewardModel, world: World) -> dict[str, float]:
        """Loss over the validation rows; accuracies at logit 0 of each label, for sources that have it both ways."""
        # Every process computes all rows: there are few, and none may wait for one that has none left.
        logits, right = _logits(model, self.validation)
        nats = np.nansum(np.logaddexp(0, logits) - right * logits)
        figures = {"validation": float(nats) / len(self.validation)}
        sources = np.array([row.source for row in self.validation])
        for source in sorted(set(sources)):
            for place, label in enumerate(self.labels):
                chosen = (sources == source) & ~np.isnan(right[:, place])
                if len(set(right[chosen, place])) > 1:
                    hits = (logits[chosen, place] > 0) == (right[chosen, place] == 1)
                    figures[f"{source}_{label}_accuracy"] = float(hits.mean())
        return figures


def _logits(model: RewardModel, rows: list[LabelledRow]) -> tuple[Floats, Floats]:
    """Logits and known labels of rows, both [rows, labels]."""
    logits_RL = last_logits(model, [row.ids for row in rows])
    return logits_RL.double().numpy(), np.array([row.labels for row in rows])
