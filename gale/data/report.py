"""``report.html`` beside prepared data: before and after, what was dropped and why, from the manifest's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from gale.core import files
from gale.data.report_plots import draw

REPORT = "report.html"
_TOTALS = ("files", "read", "read_bytes", "kept", "kept_bytes", "documents", "tokens")


def write_report(folder: Path, manifest: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write ``folder/report.html``, one file that needs nothing else."""
    sources: list[dict[str, Any]] = manifest["sources"]
    reasons, languages = _reasons(sources), _summed(sources, "languages")
    text = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_PAGE)
        .render(
            manifest=manifest,
            sources=sources,
            plots=Markup(draw(sources, reasons, languages)),  # noqa: S704 - matplotlib escapes what it writes
            total={key: sum(source[key] for source in sources) for key in _TOTALS},
            tokens_of={name: split["tokens"] for name, split in manifest["splits"].items()},
            reasons=reasons.most_common(),
            redacted=_summed(sources, "redacted").most_common(),
            broken=[source for source in sources if source["broken_lines"]],
            samples=samples,
            size=_size,
        )
    )
    files.write_text(folder / REPORT, text)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _summed(sources: Sequence[Mapping[str, Any]], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for source in sources:
        total.update(source[key])
    return total


def _reasons(sources: Sequence[Mapping[str, Any]]) -> Counter[str]:
    total = _summed(sources, "dropped")
    for source in sources:
        total.update({name: source[name] for name in ("empty", "duplicates", "near_duplicates")})
    return +total


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prepared data</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
  .scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
  table { border-collapse: collapse; font-size: 13px; width: 100%; }
  th, td { padding: .3rem .5rem; border-bottom: 1px solid #dde4ea; text-align: right; vertical-align: top; }
  th:first-child, td:first-child, .text { text-align: left; }
  td.text { overflow-wrap: anywhere; } th { background: #f4f7f9; }
  tfoot td { font-weight: 600; } code { font-size: 12px; overflow-wrap: anywhere; } .note { color: #5b6b7a; }
</style>
<h1>Prepared data</h1>
<p>{{ "{:,}".format(total.read) }} documents ({{ size(total.read_bytes) }}) were read and
{{ "{:,}".format(total.kept) }} ({{ size(total.kept_bytes) }}) kept, which make
{{ "{:,}".format(total.documents) }} documents and {{ "{:,}".format(total.tokens) }} tokens
after repeating or leaving out what the recipe says.</p>
<p class="note">Fingerprint <code>{{ manifest.fingerprint }}</code></p>
<div class="scroll">{{ plots }}</div>

<h2>Sources</h2>
<div class="scroll"><table>
<thead><tr><th>source</th><th class="text">licence</th><th class="text">origin</th><th>split</th><th>files</th>
<th>read</th><th>kept</th><th>kept, %</th><th>weight</th><th>epochs</th><th>documents</th><th>tokens</th>
<th>share of split, %</th></tr></thead>
<tbody>
{% for s in sources %}
<tr><td>{{ s.file }}</td><td class="text">{{ s.licence }}</td><td class="text">{{ s.origin }}</td><td>{{ s.split }}</td>
<td>{{ "{:,}".format(s.files) }}</td><td>{{ "{:,}".format(s.read) }}</td><td>{{ "{:,}".format(s.kept) }}</td>
<td>{{ "{:.1f}".format(100 * s.kept / s.read) if s.read else "" }}</td>
<td>{{ "" if s.weight is none else "{:g}".format(s.weight) }}</td><td>{{ "{:.4g}".format(s.epochs) }}</td>
<td>{{ "{:,}".format(s.documents) }}</td><td>{{ "{:,}".format(s.tokens) }}</td>
<td>{{ "{:.1f}".format(100 * s.tokens / tokens_of[s.split]) }}</td></tr>
{% endfor %}
</tbody>
<tfoot><tr><td>all</td><td></td><td></td><td></td><td>{{ "{:,}".format(total.files) }}</td>
<td>{{ "{:,}".format(total.read) }}</td><td>{{ "{:,}".format(total.kept) }}</td>
<td>{{ "{:.1f}".format(100 * total.kept / total.read) if total.read else "" }}</td><td></td><td></td>
<td>{{ "{:,}".format(total.documents) }}</td><td>{{ "{:,}".format(total.tokens) }}</td><td></td></tr></tfoot>
</table></div>

<h2>Dropped</h2>
{% if reasons %}
<div class="scroll"><table>
<thead><tr><th>source</th>{% for name, _ in reasons %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for s in sources %}
<tr><td>{{ s.file }}</td>{% for name, _ in reasons %}
<td>{{ "{:,}".format(s.dropped.get(name) or s.get(name) or 0) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
<tfoot><tr><td>all</td>{% for _, count in reasons %}<td>{{ "{:,}".format(count) }}</td>{% endfor %}</tr></tfoot>
</table></div>
{% else %}<p>Nothing.</p>{% endif %}

{% if redacted %}
<h2>Redacted</h2>
<table>
<thead><tr><th>source</th>{% for name, _ in redacted %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for s in sources %}
<tr><td>{{ s.file }}</td>{% for name, _ in redacted %}
<td>{{ "{:,}".format(s.redacted.get(name, 0)) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
<tfoot><tr><td>all</td>{% for _, count in redacted %}<td>{{ "{:,}".format(count) }}</td>{% endfor %}</tr></tfoot>
</table>
{% endif %}

{% if manifest.evaluations %}
<h2>Kept apart from evaluations</h2>
<table>
<thead><tr><th>file</th><th>texts</th><th>too short to look for</th><th>training documents dropped</th></tr></thead>
<tbody>
{% for e in manifest.evaluations %}
<tr><td>{{ e.file }}</td><td>{{ "{:,}".format(e.texts) }}</td><td>{{ "{:,}".format(e.too_short) }}</td>
<td>{{ "{:,}".format(e.dropped) }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}

{% if broken %}
<h2>Rows that could not be read</h2>
{% for s in broken %}
<p>{{ s.file }}: {{ "{:,}".format(s.broken_lines) }}, the first of them:</p>
<ul>{% for line in s.first_broken_lines %}<li><code>{{ line }}</code></li>{% endfor %}</ul>
{% endfor %}
{% endif %}

{% if samples %}
<h2>Samples of what was dropped</h2>
<p class="note">Their beginnings, or the words they share with an evaluation, with personal data redacted.
All of them are in dropped.jsonl.</p>
<div class="scroll"><table>
<thead><tr><th>source</th><th class="text">reason</th><th class="text">text</th></tr></thead>
<tbody>
{% for s in samples[:200] %}
<tr><td>{{ s.source }}</td>
<td class="text">{{ s.reason }}{% if s.like %}: {{ s.like.rpartition("/")[2] }}{% endif %}</td>
<td class="text">{{ s.excerpt }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</html>
"""
