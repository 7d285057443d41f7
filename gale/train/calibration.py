"""From a classifier's logits to probabilities that can be taken at their word, and how far they can.

Platt scaling (Platt 1999) fits a slope and an intercept on rows that were not trained on; the expected calibration
error (Naeini et al. 2015, Guo et al. 2017) is how far probabilities lie from how often they are right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gale.core.errors import DataError
from gale.model.classifier import Calibration

BINS = 15
_STEPS = 100
_THRESHOLDS = np.linspace(0.05, 0.95, 91)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def calibrate(logits: Floats, right: Flags, *, label: str) -> Calibration:
    """The scaling that makes the rows likeliest, and the threshold of the best macro-F1 on them.

    Raises :class:`DataError` where all rows are alike: nothing can be learnt from them.
    """
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        raise DataError(
            f"The rows to calibrate on hold {positive} with the label {label!r} and {negative} without it.",
            hint="Raise calibration_share, or give more rows.",
        )
    # Platt's targets: as if one more row of each kind had been seen, so that separable rows have a finite slope.
    target = np.where(right, (positive + 1) / (positive + 2), 1 / (negative + 2))
    features = np.stack([logits, np.ones_like(logits)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(_STEPS):  # Newton's method on a convex loss, with halved steps where a whole one overshoots
        chance = _sigmoid(features @ weights)
        gradient = features.T @ (chance - target)
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        before, scale = _nats(features @ weights, target), 1.0
        while scale > 1e-6 and _nats(features @ (weights - scale * step), target) > before:
            scale /= 2
        weights = weights - scale * step
        if np.abs(scale * step).max() < 1e-9:
            break
    chance = _sigmoid(features @ weights)
    threshold = max(_THRESHOLDS, key=lambda least: (_binary_macro_f1(right, chance >= least), -abs(least - 0.5)))
    return Calibration(float(weights[0]), float(weights[1]), float(round(threshold, 4)))


def calibrated(logits: Floats, fitted: Calibration) -> Floats:
    """Probabilities of logits."""
    return _sigmoid(fitted.slope * logits + fitted.intercept)


def expected_calibration_error(chance: Floats, right: Flags) -> float:
    """The mean distance, over rows in :data:`BINS` bins of like probability, from the share that is right."""
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=chance - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(chance))


def _binary_macro_f1(right: Flags, given: Flags) -> float:
    total = 0.0
    for wanted in (True, False):
        both = int((right == wanted).sum() + (given == wanted).sum())
        total += 2 * int(((right == wanted) & (given == wanted)).sum()) / both if both else 0.0
    return total / 2


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _nats(logits: Floats, target: Floats) -> float:
    return float((np.logaddexp(0, logits) - target * logits).sum())
