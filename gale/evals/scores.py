"""Figures with what they need to be judged: the level of chance, the number of items and a 95% interval.

Every interval is a pure function of the answers, so that an evaluation run twice prints the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_Z = 1.959964  # a standard normal lies within this of zero in 95% of cases

Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one task, between ``low`` and ``high`` with 95% confidence (None where one item says nothing).

    ``chance`` is what guessing all possible answers alike would score, ``majority`` what always giving the commonest
    one would.
    """

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    chance: float
    items: int
    majority: float | None = None
    lower_is_better: bool = False


def share_score(
    task: str, metric: str, points: Sequence[float], *, chance: float, majority: float | None = None
) -> Score:
    """The mean of points from 0 to 1: a Wilson interval where each is 0 or 1, a bootstrap where some lie between."""
    values = np.asarray(points, dtype=np.float64)
    low: float | None
    high: float | None
    if np.isin(values, (0.0, 1.0)).all():
        low, high = wilson(int(values.sum()), len(values))
    else:
        low, high = bootstrap(lambda chosen: float(values[chosen].mean()), len(values))
    return Score(task, metric, float(values.mean()), low, high, chance, len(values), majority)


def wilson(successes: int, items: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927), which stays within 0 and 1 however few the items are."""
    share = successes / items
    middle = share + _Z**2 / (2 * items)
    half = _Z * math.sqrt(share * (1 - share) / items + _Z**2 / (4 * items**2))
    scale = 1 + _Z**2 / items
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap(statistic: Callable[[Indices], float], items: int) -> tuple[float | None, float | None]:
    """The middle 95% of ``statistic`` over items drawn with replacement (Efron 1979), always the same draws."""
    if items < 2:
        return None, None
    draw = np.random.default_rng(0)
    values = [statistic(draw.integers(items, size=items)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
