"""Curves of a run, drawn where people look."""

from __future__ import annotations

import io
from pathlib import Path

from gale.core import files
from gale.train.metrics import read_metrics


def plot_curves(metrics: Path, out: Path, *, title: str) -> None:
    """Draw training and held-out loss over tokens from a metrics file as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in read_metrics(metrics) if "step" in row]
    # Fixed salt and no date, so that the same run draws the same file.
    with rc_context({"svg.hashsalt": "gale", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        tokens = [row["tokens"] / 1e6 for row in rows]
        axes.plot(tokens, _smooth([row["loss"] for row in rows]), label="training (smoothed)", linewidth=1.2)
        for name in sorted({name for row in rows for name in row.get("held_out", {})}):
            points = [(row["tokens"] / 1e6, row["held_out"][name]) for row in rows if name in row.get("held_out", {})]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel="million tokens", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    files.write_bytes(out, buffer.getvalue())


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without a cold start."""
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
