"""The report to read: as Markdown, and as one HTML file with plots that opens anywhere."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

from gale.core.model_folder import model_name

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; }
details { margin: 0.5rem 0; } summary { cursor: pointer; }
dl { margin: 0.5rem 0 1.5rem; } dt { font-weight: 600; margin-top: 0.6rem; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: #666; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } th, td { border-color: #444; } .note { color: #999; }
  figure { background: #fff; border-radius: 4px; }
}
"""
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
    title = html.escape(f"Evaluation of {model_name(Path(report['model']))}")
    parts = [f"<h1>{title}</h1>", f'<p class="note">{html.escape(_LEGEND)} {html.escape(report["compute"])}.</p>']
    for rows, label, most in (
        (shares, "score (higher is better)", 1.0),
        (bits, "bits per byte (lower is better)", 8.0),
    ):
        if rows:
            parts.append(f"<figure>{_plot(rows, label, most)}</figure>")
    parts.append(_html_table(report["scores"]))
    for name, task in report["tasks"].items():
        parts += [f"<h2>{html.escape(name)}</h2>", f'<p class="note">{html.escape(_about(task))}</p>']
        if task["groups"]:
            parts.append(_html_table(task["groups"]))
        parts.append(_samples(task["samples"]))
    for name, scores in report["reading"].items():
        parts += [f"<h2>{html.escape(name)}</h2>", _samples(scores["samples"])]
    if report["answers"]:
        pairs = "".join(
            f"<dt>{html.escape(item['prompt'])}</dt><dd>{html.escape(item['answer'] or '(nothing)')}</dd>"
            for item in report["answers"]
        )
        parts += ["<h2>Answers</h2>", f"<dl>{pairs}</dl>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


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


def _html_table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _about(task: dict[str, Any]) -> str:
    notes = [f"{task['kind']}, {task['file']} ({task['origin']}, {task['licence']})", f"{task['shots']} shots"]
    notes += [f"{name.replace('_', ' ')}: {count}" for name, count in task["notes"].items() if count]
    return "; ".join(notes)


def _samples(samples: list[dict[str, Any]]) -> str:
    shown = []
    for sample in samples:
        pairs = "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in sample.items()
        )
        shown.append(f"<dl>{pairs}</dl>")
    return (
        f"<details><summary>The first {len(samples)} answers</summary>{'<hr>'.join(shown)}</details>" if shown else ""
    )


def _plot(rows: list[dict[str, Any]], label: str, most: float) -> str:
    """A bar for each score with its interval, and a mark where chance is, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Fixed salt and no date, so that the same report draws the same file.
    style: dict[Any, Any] = {"svg.hashsalt": "gale", "svg.fonttype": "none", "text.parse_math": False}
    with rc_context(style):
        figure = Figure(figsize=(8, 0.8 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(rows))
        values = [row["value"] for row in rows]
        axes.barh(places, values, height=0.6, color="#4c78a8", label="score")
        known = [(place, row) for place, row in enumerate(rows) if row["low"] is not None]
        for place, row in known:
            axes.plot([row["low"], row["high"]], [place, place], color="#222", linewidth=1.4, solid_capstyle="butt")
        for place, row in enumerate(rows):
            axes.plot([row["chance"]] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=2)
        axes.plot([], [], color="#222", linewidth=1.4, label="95% interval")
        axes.plot([], [], color="#e45756", linewidth=2, label="chance")
        axes.set_yticks(places, [f"{row['task']}: {row['metric']}" for row in rows])
        axes.set(xlim=(0, max(most, *values) * 1.02), xlabel=label)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]
