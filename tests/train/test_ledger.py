"""The ledger counts what was spent, with the source in and out, and gives no ratio that would flatter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gale.core.errors import DataError
from gale.train.ledger import Cost, Curve, entry, reach, read_curve
from gale.train.pretrain import pretrain
from tests.train.runs import recipe

COSTS: dict[str, Any] = {
    "cold": [Cost(100, 10), Cost(100, 14)],
    "source": [Cost(40, 6), Cost(40, 6)],
    "warm": [Cost(20, 3), Cost(30, 3)],
    "grown_losses": [2.0, 2.1],
    "continued_losses": [2.2, 2.05],
}


def test_ratios_are_given_with_the_source_out_in_and_shared() -> None:
    account = entry(**COSTS, uses=(4,))
    assert account["ratios"] == {
        "marginal": pytest.approx({"flops": 0.25, "cpu_seconds": 0.25}),
        "total": pytest.approx({"flops": 0.65, "cpu_seconds": 0.75}),
        "over_4_uses": pytest.approx({"flops": 0.35, "cpu_seconds": 0.375}),
    }
    assert account["seeds_better_than_continued"] == 1


@pytest.mark.parametrize("continued", [[2.0, 2.1], [1.9, 2.1]])
def test_no_ratio_is_given_where_the_continued_source_is_as_good(continued: list[float]) -> None:
    account = entry(**COSTS | {"continued_losses": continued})
    assert account["ratios"] is None
    assert "trained on for the same operations" in account["no_ratio"]


def test_no_ratio_is_given_where_a_seed_never_arrived() -> None:
    account = entry(**COSTS | {"warm": [Cost(20, 3), None]})
    assert account["ratios"] is None
    assert account["no_ratio"] == "1 of 2 seeds did not reach the target"


def test_the_cheapest_of_several_lengths_counts() -> None:
    short = Curve((10, 20), (3.0, 2.5), Cost(200, 2))
    long = Curve((10, 20, 40), (3.2, 2.9, 2.0), Cost(400, 4))
    assert reach([short, long], 2.5) == Cost(200, 2)
    assert reach([short, long], 2.2) == Cost(400, 4)
    assert reach([short, long], 3.0) == Cost(100, 1)
    assert reach([short, long], 1.9) is None


def test_a_curve_is_read_from_what_a_run_leaves(prepared: Path, tmp_path: Path) -> None:
    summary = pretrain(recipe(prepared), tmp_path / "run")
    curve = read_curve(tmp_path / "run", cpu_seconds=8.0)
    assert curve.tokens == (3 * 4 * 48, 6 * 4 * 48)
    assert curve.final == summary["final"]["held_out"]["english"]
    assert curve.total == Cost(summary["flops"], 8.0)
    assert curve.cost(0) == Cost(summary["flops"] / 2, 4.0)
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(DataError, match="no finished run"):
        read_curve(tmp_path / "run", cpu_seconds=1.0)
