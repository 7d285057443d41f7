"""The report to read: as Markdown, and as one HTML file with plots that opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gale.core.charts import COLOURS, SOFT, inline_figure
from gale.core.model_folder import model_name
from gale.core.page import Markup, facts, figures, folded, note, page, section, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADINGS = ("task", "metric", "score", "95% interval", "chance", "always the commonest", "items")
_LEGEND = (
    "Chance is what guessing all possible answers alike would score (8 bits per byte; nothing for written answers). "
    "Lower is better for bits per byte, higher for all others."
)

_NAMES = {"f1": "F1"}  # figures whose names are more than their keys


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# Evaluation of {model_name(Path(report['model']))}", "", *_table(report["scores"]), "", _LEGEND]
    if report["bits_per_byte"]:
        lines += ["", "## Bits per byte (lower is better; 8 is chance)", ""]
        lines += [f"- {name}: {value:.3f}" for name, value in report["bits_per_byte"].items()]
    for name, scores in report["reading"].items():
        lines += ["", f"## {name}", ""]
        lines += [
            f"- {_NAMES.get(key, key.replace('_', ' '))}: {value}"
            for key, value in scores.items()
            if key != "samples" and value is not None
        ]
    for name, task in report["tasks"].items():
        lines += ["", f"## {name}", "", _about(task)]
        if task["groups"]:
            lines += ["", *_table(task["groups"])]
    if report["answers"]:
        lines += ["", "## Answers", ""]
        for item in report["answers"]:
            lines += [f"**{item['prompt']}**", "", item["answer"] or "(nothing)", ""]
    return "\n".join(lines) + "\n"


def to_html(report: dict[str, Any]) -> str:
    """The report as one self-contained page: plots of every score beside its chance, tables, samples and answers."""
    shares = [row for row in report["scores"] if not row["lower_is_better"]]
    bits = [row for row in report["scores"] if row["lower_is_better"]]
    charts = [
        figures([(title, about, _chart(title, rows, most))])
        for title, about, rows, most in (
            ("Scores", "higher is better", shares, 1.0),
            ("Bits per byte", "lower is better", bits, 8.0),
        )
        if rows
    ]
    parts = [section("All scores", *charts, _score_table(report["scores"]), note(_LEGEND))]
    for name, task in report["tasks"].items():
        groups = [_score_table(task["groups"])] if task["groups"] else []
        parts.append(section(name, note(_about(task)), *groups, *_samples(task["samples"])))
    for name, scores in report["reading"].items():
        parts.append(section(name, *_samples(scores["samples"])))
    if report["answers"]:
        answers = [facts({item["prompt"]: item["answer"] or "(nothing)"}) for item in report["answers"]]
        parts.append(section("Answers", *answers))
    title = f"Evaluation of {model_name(Path(report['model']))}"
    return page(title, kicker="Gale · evaluation", lead=f"{report['compute']}.", body=parts)


def _cells(row: dict[str, Any]) -> list[str]:
    interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    majority = "" if row["majority"] is None else f"{row['majority']:.3f}"
    return [
        row["task"],
        row["metric"],
        f"{row['value']:.3f}",
        interval,
        f"{row['chance']:.3f}",
        majority,
        str(row["items"]),
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        cells = (" ".join(cell.replace("|", r"\|").split()) for cell in _cells(row))  # groups are named by the rows
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _score_table(rows: list[dict[str, Any]]) -> Markup:
    return table(_HEADINGS, map(_cells, rows), words=2)


def _about(task: dict[str, Any]) -> str:
    notes = [f"{task['kind']}, {task['file']} ({task['origin']}, {task['licence']})", f"{task['shots']} shots"]
    notes += [f"{name.replace('_', ' ')}: {count}" for name, count in task["notes"].items() if count]
    return "; ".join(notes)


def _samples(samples: list[dict[str, Any]]) -> list[Markup]:
    shown = Markup("".join(map(facts, samples)))
    return [folded(f"The first {len(samples)} answers", shown)] if samples else []


def _chart(title: str, rows: list[dict[str, Any]], most: float) -> Markup:
    """A bar for each score with its interval, and a mark where chance is."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = range(len(rows))
        values = [row["value"] for row in rows]
        axes.barh(places, values, height=0.6, color=COLOURS[0], label="score")
        for place, row in enumerate(rows):
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=SOFT, linewidth=1.4, solid_capstyle="butt")
            axes.plot([row["chance"]] * 2, [place - 0.4, place + 0.4], color=COLOURS[1], linewidth=2)
        axes.plot([], [], color=SOFT, linewidth=1.4, label="95% interval")
        axes.plot([], [], color=COLOURS[1], linewidth=2, label="chance")
        axes.set_yticks(places, [f"{row['task']}: {row['metric']}" for row in rows])
        axes.set_xlim(0, max(most, *values) * 1.02)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper right", ncols=3)

    return inline_figure(draw, name=title, width=10.4, height=0.8 + 0.32 * len(rows))
