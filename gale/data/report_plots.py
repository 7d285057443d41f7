"""The charts of a data report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gale.core.charts import COLOURS, FAINT, inline_figure
from gale.core.page import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SOURCES = 30  # more than these would not be read; the tables hold all
_BARS = 15


def charts(
    sources: Sequence[Mapping[str, Any]], reasons: Counter[str], languages: Counter[str]
) -> list[tuple[str, str, Markup]]:
    """Documents and bytes of each source before and after, why documents went, sizes, languages."""
    shown = sources[:_SOURCES]
    tall = 0.8 + 0.34 * len(shown)
    unit, name = (1e6, "MB") if max(source["read_bytes"] for source in shown) >= 1e6 else (1e3, "kB")
    found = [
        _chart("Documents", "of each source", tall, lambda axes: _before_and_after(axes, shown, "read", "kept", 1)),
        _chart("Dropped", "documents, by reason", _height(reasons), lambda axes: _bars(axes, reasons)),
        _chart(
            "Text",
            f"{name} of text",
            tall,
            lambda axes: _before_and_after(axes, shown, "read_bytes", "kept_bytes", unit),
        ),
        _chart("Sizes", "documents by their bytes of UTF-8", 2.7, lambda axes: _sizes(axes, sources)),
    ]
    if languages:
        found.append(_chart("Languages", "documents, before", _height(languages), lambda axes: _bars(axes, languages)))
    return found


def _chart(title: str, note: str, height: float, draw: Callable[[Axes], None]) -> tuple[str, str, Markup]:
    width = 10.4 if title == "Documents" else 5.2  # the first is as wide as the page
    chart = inline_figure(lambda figure: draw(figure.add_subplot()), name=title, width=width, height=height)
    return title, note, chart


def _height(rows: Counter[str]) -> float:
    return 0.6 + 0.24 * max(3, min(_BARS, len(rows)))


def _before_and_after(axes: Axes, sources: Sequence[Mapping[str, Any]], before: str, after: str, unit: float) -> None:
    places = range(len(sources))
    for key, offset, colour, label in ((before, -0.2, FAINT, "before"), (after, 0.2, COLOURS[0], "after")):
        values = [source[key] / unit for source in sources]
        axes.barh([place + offset for place in places], values, 0.4, color=colour, label=label)
    axes.set_yticks(list(places), [_short(source["file"]) for source in sources])
    axes.invert_yaxis()
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes.grid(visible=False, axis="y")


def _bars(axes: Axes, counts: Counter[str]) -> None:
    rows = counts.most_common(_BARS)
    if not rows:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
    bars = axes.barh([name for name, _ in rows], [count for _, count in rows], color=COLOURS[0])
    axes.bar_label(bars, fmt="{:,.0f}", padding=2)
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _sizes(axes: Axes, sources: Sequence[Mapping[str, Any]]) -> None:
    kinds = (("sizes_before", 1.0, FAINT, "before"), ("sizes_after", 0.6, COLOURS[0], "after"))
    for key, width, colour, label in kinds:
        total: Counter[int] = Counter()
        for source in sources:
            total.update({int(bits): count for bits, count in source[key].items()})
        steps = range(min(total, default=0), max(total, default=0) + 1)
        axes.bar(list(steps), [total[bits] for bits in steps], width, color=colour, label=label)
    low, high = (int(limit) for limit in axes.get_xlim())
    marks = [bits for bits in range(max(0, low), high + 2) if bits % 3 == 1]
    axes.set_xticks([bits - 0.5 for bits in marks], [_bytes(2 ** (bits - 1)) for bits in marks])
    axes.legend()
    axes.grid(visible=False, axis="x")


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GiB"


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:13] + "…" + name[-14:]
