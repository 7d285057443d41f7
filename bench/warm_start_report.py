"""What came out of bench/warm_start.py, as tables and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gale.core import files
from gale.core.charts import COLOURS, SOFT, standalone_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(result: dict[str, Any]) -> str:
    """What came out, as Markdown."""
    lines = ["| source tokens | held-out loss | improvement by doubling |", "|---|---|---|"]
    for point in result["source"]["series"]:
        better = "" if point["improvement"] is None else f"{point['improvement']:.3f}"
        lines.append(f"| {point['tokens']:,} | {point['loss']:.4f} | {better} |")
    flat = result["source"]["series"][-1]["flat"]
    rule = f"Rule: flat where doubling improves by less than {result['source']['flat_below']} nats. "
    lines += ["", rule + ("It is." if flat else "IT IS NOT: the most tokens of this edition were not enough."), ""]
    lines += [
        "| arm | starts at | target (cold) | grown at the comparison | source continued for equal FLOPs | seeds better "
        "| reached the target | marginal | total | over 3 uses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in result["arms"].items():
        began = statistics.fmean(arm["start"]["held_out"]["grown"].values())
        cells = [
            name,
            f"{began:.4f}",
            f"{arm['target']:.4f}",
            f"{arm['grown_loss']:.4f}",
            f"{arm['continued_loss']:.4f}",
            f"{arm['seeds_better_than_continued']}/{arm['seeds']}",
            f"{arm['seeds_that_reached']}/{arm['seeds']}",
        ]
        if ratios := arm["ratios"]:
            kinds = ("marginal", "total", "over_3_uses")
            cells += [f"{ratios[kind]['flops']:.2f} / {ratios[kind]['cpu_seconds']:.2f}" for kind in kinds]
        else:
            cells += [f"none: {arm['no_ratio']}", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Losses in nats per token, means of the seeds; ratios as FLOPs / CPU seconds. Marginal: the source was there "
        "anyway. Total: with the source trained for this.",
        "For HunYuan-NLP-1T Tencent reported 1/8 for a warm start; that is theirs, at their size, and not shown here.",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Held-out loss over operations: a panel a shape."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(result["cold"]), sharey=True)
        for axes, name in zip(panels, result["cold"], strict=True):
            lines = {"cold": result["cold"][name]["curve"]}
            for arm, about in result["arms"].items():
                if about["shape"] == name:
                    lines[f"grown: {arm}"] = about["curves"]["grown"]
                    lines["source continued"] = about["curves"]["continued"]
            for colour, (label, seeds) in zip(COLOURS, lines.items(), strict=False):
                for seed, points in enumerate(seeds):
                    axes.plot(*zip(*points, strict=True), color=colour, alpha=0.8, label="" if seed else label)
            axes.axhline(statistics.fmean(result["cold"][name]["losses"]), color=SOFT, linestyle=":", linewidth=1)
            axes.set(xlabel="FLOPs after the source", title=name)
            axes.legend()
        panels[0].set(ylabel="held-out loss (nats per token)")
        low = min(min(arm["grown_losses"]) for arm in result["arms"].values())
        panels[0].set_ylim(low - 0.05, max(result["source"]["losses"]) + 0.35)

    files.write_bytes(out, standalone_figure(draw, width=11, height=4))
