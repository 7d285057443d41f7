"""What a warm start costs beside a cold one, with the source counted in and out.

A cold start is a model trained from fresh weights to the end of its schedule; its last held-out loss is the target. A
warm start is a grown model (:mod:`gale.train.grow`) that is trained until it has reached that loss. With C for cost,

* marginal ``C_warm / C_cold``: the source was there anyway;
* total ``(C_source + C_warm) / C_cold``: it had to be trained for this;
* amortised over k uses ``(C_source / k + C_warm) / C_cold``.

None of them is worth anything where the source itself, trained on for the same operations, would have come further:
then growing was a detour, and :func:`entry` gives no ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gale.core.errors import DataError
from gale.core.model_folder import read_json
from gale.train.run_log import read_run


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations and CPU seconds."""

    flops: float
    cpu_seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.cpu_seconds + other.cpu_seconds)

    def __mul__(self, share: float) -> Cost:
        return Cost(self.flops * share, self.cpu_seconds * share)

    def over(self, other: Cost) -> dict[str, float]:
        """This cost as a share of another, for each currency."""
        return {"flops": self.flops / other.flops, "cpu_seconds": self.cpu_seconds / other.cpu_seconds}


@dataclass(frozen=True, slots=True)
class Curve:
    """Held-out loss of one run, the mean over its splits, at each evaluation, and what the run had cost by then."""

    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    total: Cost

    @property
    def final(self) -> float:
        """The loss after the last step, with the learning rate at its end."""
        return self.losses[-1]

    def cost(self, index: int) -> Cost:
        """What had been spent at an evaluation: every token of a run costs the same."""
        return self.total * (self.tokens[index] / self.tokens[-1])


def read_curve(run: Path, cpu_seconds: float) -> Curve:
    """The curve of a finished run that took ``cpu_seconds`` of processor time to train. Raises :class:`DataError`."""
    rows = [row for row in read_run(run).rows if row.get("held_out")]
    summary = read_json(run / "summary.json")
    if not rows or "flops" not in summary:
        raise DataError(f"{run} holds no finished run with held-out losses.")
    losses = [statistics.fmean(row["held_out"].values()) for row in rows]
    return Curve(tuple(row["tokens"] for row in rows), tuple(losses), Cost(summary["flops"], cpu_seconds))


def reach(curves: Sequence[Curve], target: float) -> Cost | None:
    """The least that any of these runs had cost when its held-out loss was at ``target`` or below; None: none was.

    Runs of several lengths belong here, each with a schedule of its own: a learning rate that has not fallen yet hides
    what a model has learned.
    """
    costs = [curve.cost(index) for curve in curves for index, loss in enumerate(curve.losses) if loss <= target]
    return min(costs, key=lambda cost: cost.flops, default=None)


def mean(costs: Sequence[Cost]) -> Cost:
    """The mean cost of several seeds."""
    return Cost(statistics.fmean(cost.flops for cost in costs), statistics.fmean(cost.cpu_seconds for cost in costs))


def entry(
    *,
    warm: Sequence[Cost | None],
    cold: Sequence[Cost],
    source: Sequence[Cost],
    grown_losses: Sequence[float],
    continued_losses: Sequence[float],
    uses: Sequence[int] = (3, 10),
) -> dict[str, Any]:
    """One arm's account over all seeds.

    ``warm`` is what each seed had cost when it reached the target; ``grown_losses`` and ``continued_losses`` are of the
    grown model and of its source after equal operations. ``ratios`` is None, with the reason in ``no_ratio``, where the
    continued source is better on average, and where a seed never reached the target.
    """
    grown, continued = statistics.fmean(grown_losses), statistics.fmean(continued_losses)
    reached = [cost for cost in warm if cost is not None]
    account: dict[str, Any] = {
        "grown_loss": grown,
        "continued_loss": continued,
        "seeds_better_than_continued": sum(a < b for a, b in zip(grown_losses, continued_losses, strict=True)),
        "seeds": len(warm),
        "seeds_that_reached": len(reached),
        "ratios": None,
    }
    if not grown < continued:
        account["no_ratio"] = "the source, trained on for the same operations, is better"
    elif len(reached) < len(warm):
        account["no_ratio"] = f"{len(warm) - len(reached)} of {len(warm)} seeds did not reach the target"
    else:
        spent, whole, before = mean(reached), mean(cold), mean(source)
        account["ratios"] = {
            "marginal": spent.over(whole),
            "total": (before + spent).over(whole),
            **{f"over_{k}_uses": (before * (1 / k) + spent).over(whole) for k in uses},
        }
    return account
