"""The report of a run: one page that needs nothing but itself, made from the run's metrics at any time.

The same metrics give the same bytes, so a report can be made again, or for a run that is going on or was killed.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.charts import Line, inline_chart, smooth, standalone_chart
from gale.core.page import Markup, code, facts, figures, folded, page, section, table, tiles
from gale.train.run_log import RunLog, read_run

REPORT = "report.html"
_LOSS_UNITS = {"reward": "nats per pair", "dpo": "per pair", "grpo": "per token", "ppo": "per token"}
_MORE_IS_BETTER = ("_accuracy", "_reward", "_gold")  # ends of held-out figures that are no losses
_TITLES = {  # of what every run measures, with units; anything else is called by its own name
    "learning_rate": ("Learning rate", ""),
    "gradient_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Throughput", "tokens per second"),
    "kl": ("KL divergence", "nats, from the reference model"),
    "held_out": ("Held out", "more is better"),
}
_MOST_TABLE_ROWS = 30
_SAMPLES_FROM_STEPS = 6


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run and return its path. Raises :class:`DataError` without metrics."""
    log = read_run(run)
    header = _header(run, log)
    recipe: dict[str, Any] = header.pop("recipe", None) or {}
    parts: list[Markup] = [tiles(_tiles(log, header))]
    if log.rows:
        parts.append(section("Curves", figures(_charts(log, _loss_unit(header)))))
    if samples := _samples(log):
        parts.append(section("Samples", table(["step", "prompt", "the model goes on"], samples, prose=True)))
    details: list[Markup] = []
    if evaluated := [row for row in log.rows if row.get("held_out")]:
        details.append(folded("Evaluations as figures", _evaluations(evaluated)))
    if recipe:
        details.append(folded("Resolved recipe", code(to_toml(recipe))))
    parts.append(section("The run", facts(_facts(log, header)), *details))
    stage = str(header.get("stage", "run"))
    content = page(run.resolve().name, kicker=f"Gale · {stage}", lead=_lead(log, recipe), body=parts)
    files.write_text(run / REPORT, content)
    return run / REPORT


def plot_curves(metrics: Path, out: Path, *, title: str) -> None:
    """Draw training and held-out loss over tokens as an SVG file, for model cards; ``title`` is the stage."""
    lines, x_label = _loss_lines(read_run(metrics.parent))
    unit = _LOSS_UNITS.get(title, "nats per token")
    files.write_bytes(out, standalone_chart(lines, title=title, x_label=x_label, y_label=f"loss ({unit})"))


def to_toml(recipe: dict[str, Any]) -> str:
    """A resolved recipe as TOML; what is None is left out, since TOML has no such value."""
    plain = {key: value for key, value in recipe.items() if not isinstance(value, dict) and value is not None}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in recipe.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]"]
            lines += [f"{name} = {_toml_value(item)}" for name, item in value.items() if item is not None]
    return "\n".join(lines).strip() + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _header(run: Path, log: RunLog) -> dict[str, Any]:
    """What the metrics say of the run, and where they are silent, what older runs left beside them."""
    beside: dict[str, Any] = {}
    for name in ("recipe", "summary"):
        try:
            beside[name] = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            beside[name] = None
    summary = beside["summary"] or {}
    known = {
        key: summary[key] for key in ("stage", "parameters", "flops", "data_fingerprint", "compute") if key in summary
    }
    return {**known, "recipe": beside["recipe"], **log.header}


def _lead(log: RunLog, recipe: dict[str, Any]) -> str:
    if not log.rows:
        return "No step has been written down yet."
    done, planned = log.rows[-1]["step"], recipe.get("steps")
    if not planned:
        return f"{done:,} steps."
    if done >= planned:
        return f"All {planned:,} steps are done."
    return f"Step {done:,} of {planned:,} ({done / planned:.0%}): the run is going on, or it was stopped."


def _tiles(log: RunLog, header: dict[str, Any]) -> list[tuple[str, str, str]]:
    if not log.rows:
        return []
    last, series = log.rows[-1], log.series()
    found: list[tuple[str, str, str]] = []
    if "loss" in last:
        found.append(("Training loss", f"{last['loss']:.4f}", f"{_loss_unit(header)}, step {last['step']:,}"))
    for name, (indices, values) in series.items():
        if name.startswith("held_out/"):
            choose, extreme = (max, "highest") if name.endswith(_MORE_IS_BETTER) else (min, "lowest")
            best = choose(range(len(values)), key=values.__getitem__)
            note = f"{extreme} {values[best]:.4f}, step {log.rows[indices[best]]['step']:,}"
            found.append((f"Held out: {name.removeprefix('held_out/')}", f"{values[-1]:.4f}", note))
    if "tokens" in last:
        found.append(("Tokens", count(last["tokens"]), f"{last['tokens']:,} read"))
    if "seconds" in series:
        rate = series.get("tokens_per_second")
        note = f"median {statistics.median(rate[1]):,.0f} tokens per second" if rate else "in training steps"
        found.append(("Training time", duration(sum(series["seconds"][1])), note))
    if "parameters" in header:
        found.append(("Parameters", count(header["parameters"]), f"{header['parameters']:,}"))
    return found


def _loss_unit(header: dict[str, Any]) -> str:
    return _LOSS_UNITS.get(str(header.get("stage")), "nats per token")


def _is_held_out_loss(name: str) -> bool:
    return name.startswith("held_out/") and not name.endswith(_MORE_IS_BETTER)


def _loss_lines(log: RunLog) -> tuple[list[Line], str]:
    over, x_label = _axis(log)
    series = log.series()
    indices, values = series.get("loss", ([], []))
    x = [over[i] for i in indices]
    lines = [Line("every step", x, values, faint=True)] if len(values) > 40 else []
    lines.append(Line("training (smoothed)" if len(values) > 40 else "training", x, smooth(values)))
    for colour, name in enumerate(sorted(filter(_is_held_out_loss, series)), start=1):
        indices, values = series[name]
        lines.append(Line(name.removeprefix("held_out/"), [over[i] for i in indices], values, colour))
    return [line for line in lines if line.x], x_label


def _charts(log: RunLog, loss_unit: str) -> list[tuple[str, str, Markup]]:
    """Loss first and wide; then every other number, those of one table together."""
    over, x_label = _axis(log)
    lines, _ = _loss_lines(log)
    charts = []
    if lines:
        charts.append(("Loss", loss_unit, inline_chart(lines, name="loss", x_label=x_label, width=10.4, height=3.4)))
    groups: dict[str, list[Line]] = {}
    for name, (indices, values) in log.series().items():
        group, slash, member = name.rpartition("/")
        # The seconds of a step are its throughput again.
        if name in ("loss", "seconds", "cpu_seconds") or _is_held_out_loss(name):
            continue
        members = groups.setdefault(group if slash else name, [])
        members.append(Line(member if slash else name, [over[i] for i in indices], values, len(members)))
    order = [*(name for name in _TITLES if name in groups), *(name for name in groups if name not in _TITLES)]
    for name in order:
        title, note = _TITLES.get(name, (name.replace("_", " ").replace("/", " / ").capitalize(), ""))
        members = groups[name]
        if len(members) == 1 and len(members[0].x) > 40 and name != "learning_rate":
            (line,) = members
            members = [Line(line.name, line.x, line.y, faint=True), Line(line.name, line.x, smooth(line.y))]
        charts.append((title, note, inline_chart(members, name=name, x_label=x_label)))
    return charts


def _axis(log: RunLog) -> tuple[list[float], str]:
    key = "tokens" if all("tokens" in row for row in log.rows) else "step"
    return [float(row[key]) for row in log.rows], key


def _evaluations(rows: list[dict[str, Any]]) -> Markup:
    names = sorted({name for row in rows for name in row["held_out"]})
    every = -(-len(rows) // _MOST_TABLE_ROWS)
    shown = [row for index, row in enumerate(rows) if (len(rows) - 1 - index) % every == 0]  # with the last one
    return table(
        ["step", "tokens", "training", *names],
        [
            [
                f"{row['step']:,}",
                f"{row['tokens']:,}" if "tokens" in row else "",
                f"{row['loss']:.4f}" if "loss" in row else "",
                *(f"{row['held_out'][name]:.4f}" if name in row["held_out"] else "" for name in names),
            ]
            for row in shown
        ],
    )


def _samples(log: RunLog) -> list[list[str]]:
    """What the model wrote at the first, the last and a few steps between."""
    rows = [row for row in log.rows if row.get("samples")]
    chosen = rows
    if len(rows) > _SAMPLES_FROM_STEPS:
        spacing = (len(rows) - 1) / (_SAMPLES_FROM_STEPS - 1)
        chosen = [rows[round(i * spacing)] for i in range(_SAMPLES_FROM_STEPS)]
    return [
        [f"{row['step']:,}", str(sample.get("prompt", "")), str(sample.get("text", ""))]
        for row in chosen
        for sample in row["samples"]
    ]


def _facts(log: RunLog, header: dict[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key in ("stage", "started", "gale", "commit", "compute", "data_fingerprint", "flops"):
        if header.get(key) is not None:
            value = header[key]
            found[key.replace("_", " ").capitalize()] = f"{value:.4g}" if isinstance(value, float) else value
    if "flops" in header:
        found["FLOPs"] = found.pop("Flops")
    for key, value in (header.get("machine") or {}).items():
        found[f"Machine: {key.replace('_', ' ')}"] = value
    other = header.keys() - {"stage", "started", "gale", "commit", "compute", "data_fingerprint", "flops", "machine"}
    for key in sorted(other - {"parameters"}):
        found[key.replace("_", " ").capitalize()] = header[key]
    if log.starts > 1:
        found["Started"] = f"{found.get('Started', '')} and resumed {log.starts - 1}x".strip()
    if log.unreadable_lines:
        found["Unreadable lines"] = f"{log.unreadable_lines} of the metrics, left out here"
    return found


def count(number: float) -> str:
    """A large number with three digits and a unit: 4.1M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
    return f"{seconds / 86400:.1f} days"
