"""The plots of a data report, as SVG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEFORE, _AFTER = "#b9c4cf", "#2f6f9f"
_SOURCES = 30  # more than these would not be read; the tables hold all
_BARS = 15


def draw(sources: Sequence[Mapping[str, Any]], reasons: Counter[str], languages: Counter[str]) -> str:
    """One SVG: documents and bytes of each source before and after, why documents went, sizes, languages."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = sources[:_SOURCES]
    tall = [0.6 + 0.34 * len(shown), 0.6 + 0.24 * max(8, min(_BARS, len(reasons)))]
    if languages:
        tall.append(0.6 + 0.24 * min(_BARS, len(languages)))
    # Fixed salt and no date, so that the same numbers draw the same picture.
    style: dict[Any, Any] = {"svg.hashsalt": "gale", "svg.fonttype": "none", "font.size": 9}
    style |= {"font.family": "sans-serif", "text.parse_math": False}  # a file may be called $5_and_$6
    with rc_context(style):
        figure = Figure(figsize=(11, sum(tall) + 0.5), layout="constrained")
        axes = figure.subplots(len(tall), 2, squeeze=False, height_ratios=tall)
        _before_and_after(axes[0, 0], shown, "read", "kept", 1, "documents")
        unit, name = (1e6, "MB") if max(source["read_bytes"] for source in shown) >= 1e6 else (1e3, "kB")
        _before_and_after(axes[0, 1], shown, "read_bytes", "kept_bytes", unit, f"{name} of text")
        _bars(axes[1, 0], reasons.most_common(_BARS), "documents dropped, by reason")
        _sizes(axes[1, 1], sources)
        if languages:
            _bars(axes[2, 0], languages.most_common(_BARS), "documents by language, before")
            axes[2, 1].axis("off")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue().decode("utf-8")
    return svg[svg.index("<svg") :]


def _before_and_after(
    axes: Axes, sources: Sequence[Mapping[str, Any]], before: str, after: str, unit: float, label: str
) -> None:
    places = range(len(sources))
    axes.barh(
        [y - 0.2 for y in places], [source[before] / unit for source in sources], 0.4, color=_BEFORE, label="before"
    )
    axes.barh([y + 0.2 for y in places], [source[after] / unit for source in sources], 0.4, color=_AFTER, label="after")
    axes.set_yticks(list(places), [_short(source["file"]) for source in sources])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)


def _bars(axes: Axes, rows: Sequence[tuple[str, int]], label: str) -> None:
    if not rows:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
    bars = axes.barh([name for name, _ in rows], [count for _, count in rows], color=_AFTER)
    axes.bar_label(bars, fmt="{:,.0f}", padding=2)
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def _sizes(axes: Axes, sources: Sequence[Mapping[str, Any]]) -> None:
    for key, colour, label in (("sizes_before", _BEFORE, "before"), ("sizes_after", _AFTER, "after")):
        total: Counter[int] = Counter()
        for source in sources:
            total.update({int(bits): count for bits, count in source[key].items()})
        steps = range(min(total, default=0), max(total, default=0) + 1)
        axes.bar(
            list(steps),
            [total[bits] for bits in steps],
            1.0 if key == "sizes_before" else 0.6,
            color=colour,
            label=label,
        )
    low, high = (int(limit) for limit in axes.get_xlim())
    marks = [bits for bits in range(max(0, low), high + 2) if bits % 3 == 1]
    axes.set_xticks([bits - 0.5 for bits in marks], [_bytes(2 ** (bits - 1)) for bits in marks])
    axes.set(xlabel="size of a document, bytes of UTF-8", ylabel="documents")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GiB"


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:13] + "…" + name[-14:]
