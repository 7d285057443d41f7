"""What a task hands back, whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gale.evals.scores import Score, share_score

SHOWN = 5


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Figures, the same figures of groups of rows, counts worth knowing, and the first answers to look at."""

    scores: list[Score]
    groups: list[Score] = field(default_factory=list)
    notes: Mapping[str, int] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def group_scores(
    names: Sequence[str] | None, metric: str, points: Sequence[float], chances: Sequence[float]
) -> list[Score]:
    """The share of points within each group of rows, by name; ``names`` has the group of each row."""
    scores = []
    for name in sorted(set(names or ())):
        places = [place for place, other in enumerate(names or ()) if other == name]
        chance = sum(chances[place] for place in places) / len(places)
        scores.append(share_score(name, metric, [points[place] for place in places], chance=chance))
    return scores
