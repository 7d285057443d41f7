"""Line charts as SVG: the same numbers give the same bytes, and inside a page the colours are the page's own."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gale.core.page import CHART_COLOURS, Markup

_TEXT, _GRID = "#55645f", "#e1e8e5"
_MOST_POINTS = 1200


@dataclass(frozen=True, slots=True)
class Line:
    """Points joined by a line; ``colour`` counts through the palette, ``faint`` lines lie under a smoother one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False


def inline_chart(lines: Sequence[Line], *, name: str, x_label: str, width: float = 5.2, height: float = 2.7) -> Markup:
    """A chart to stand in a page; ``name`` must be the only one of its kind there. Sizes are in inches."""
    svg = _draw(lines, x_label=x_label, y_label="", width=width, height=height)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers count for the whole page, so each chart's get its name.
    prefix = re.sub(r"[^\w-]", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    variables = {light: f"var(--chart-{index})" for index, (light, _) in enumerate(CHART_COLOURS)}
    for colour, variable in (variables | {_TEXT: "var(--soft)", _GRID: "var(--line)"}).items():
        svg = svg.replace(colour, variable)
    return Markup(re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="chart" \1 role="img">', svg, count=1))


def standalone_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> bytes:
    """A chart as an SVG file, on white."""
    return _draw(lines, x_label=x_label, y_label=y_label, width=7, height=4, title=title).encode()


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the values, without a cold start."""
    weight = 1 - 1 / min(50.0, max(1.0, len(values) / 50))
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """As few points as a chart can show: of every bucket the lowest and the highest, so that no spike is lost."""
    size = -(-len(x) // (_MOST_POINTS // 2))
    if size <= 2:
        return list(x), list(y)
    kept: list[int] = []
    for first in range(0, len(x), size):
        bucket = range(first, min(first + size, len(x)))
        kept += sorted({min(bucket, key=y.__getitem__), max(bucket, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]


def _draw(
    lines: Sequence[Line], *, x_label: str, y_label: str, width: float, height: float, title: str | None = None
) -> str:
    import warnings

    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    # Fixed salt and no date, so that the same run draws the same file; text stays text, in the reader's own font.
    style: dict[Any, Any] = {"svg.hashsalt": "gale", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # only measured here, drawn by the reader
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white" if title else "none")
        axes = figure.add_subplot(facecolor="none")
        handles = []
        for line in lines:
            x, y = thin(line.x, line.y)
            few = len(x) <= 40 and not line.faint
            (drawn,) = axes.plot(
                x,
                y,
                color=CHART_COLOURS[line.colour % len(CHART_COLOURS)][0],
                alpha=0.28 if line.faint else 1.0,
                linewidth=0.8 if line.faint else 1.5,
                linestyle="-" if line.colour < len(CHART_COLOURS) else "--",
                marker="o" if few else None,
                markersize=3,
                solid_joinstyle="round",
            )
            if not line.faint:
                handles.append((drawn, line.name))
        values = [value for line in lines for value in line.y]
        low, high = min(values, default=0.0), max(values, default=0.0)
        if low > 0 and high > 100 * low:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(
            EngFormatter(sep="") if high >= 10_000 else FuncFormatter(lambda value, _: f"{value:g}")
        )
        axes.tick_params(colors=_TEXT, length=0, pad=5)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.set_xlabel(x_label, color=_TEXT)
        if y_label:
            axes.set_ylabel(y_label, color=_TEXT)
        if title:
            axes.set_title(title, color=_TEXT)
        if len(handles) > 1:
            axes.legend(*zip(*handles, strict=True), frameon=False, labelcolor=_TEXT, loc="best")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=title is None)
    return buffer.getvalue()
