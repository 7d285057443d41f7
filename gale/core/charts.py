"""Charts as SVG in one style: the same numbers give the same bytes, and in a page the colours are the page's own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gale.core.page import CHART_COLOURS, Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = tuple(light for light, _ in CHART_COLOURS)
SOFT, FAINT = "#55645f", "#e1e8e5"  # of words and marks, and of grids and what stands back
_MOST_POINTS = 1200
# Fixed salt, so that the same run draws the same file; text stays text, in the reader's own font; "$5_and_$6" may be a
# file's name.
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "gale",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"), SOFT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon"), False),
    **dict.fromkeys(("xtick.major.size", "xtick.minor.size", "ytick.major.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("xtick.major.pad", "ytick.major.pad"), 5),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
}


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
    return inline_figure(lambda figure: _lines(figure, lines, x_label), name=name, width=width, height=height)


def standalone_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> bytes:
    """A chart as an SVG file, on white."""
    return standalone_figure(lambda figure: _lines(figure, lines, x_label, y_label, title), width=7, height=4)


def inline_figure(draw: Callable[[Figure], None], *, name: str, width: float = 5.2, height: float = 2.7) -> Markup:
    """What ``draw`` draws in :data:`COLOURS`, :data:`SOFT` and :data:`FAINT`; as :func:`inline_chart`."""
    svg = _svg(draw, width, height, ground="none")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers count for the whole page, so each chart's get its name.
    prefix = re.sub(r"[^\w-]", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    variables = {light: f"var(--chart-{index})" for index, light in enumerate(COLOURS)}
    for colour, variable in (variables | {SOFT: "var(--soft)", FAINT: "var(--line)"}).items():
        svg = svg.replace(colour, variable)
    return Markup(re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="chart" \1 role="img">', svg, count=1))


def standalone_figure(draw: Callable[[Figure], None], *, width: float, height: float) -> bytes:
    """What ``draw`` draws as an SVG file, on white; sizes are in inches."""
    return _svg(draw, width, height, ground="white").encode()


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


def _svg(draw: Callable[[Figure], None], width: float, height: float, *, ground: str) -> str:
    import warnings

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # only measured here, drawn by the reader
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=ground)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _lines(figure: Figure, lines: Sequence[Line], x_label: str, y_label: str = "", title: str = "") -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes = figure.add_subplot()
    handles = []
    for line in lines:
        x, y = thin(line.x, line.y)
        few = len(x) <= 40 and not line.faint
        (drawn,) = axes.plot(
            x,
            y,
            color=COLOURS[line.colour % len(COLOURS)],
            alpha=0.28 if line.faint else 1.0,
            linewidth=0.8 if line.faint else 1.5,
            linestyle="-" if line.colour < len(COLOURS) else "--",
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
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if len(handles) > 1:
        axes.legend(*zip(*handles, strict=True), loc="best")
