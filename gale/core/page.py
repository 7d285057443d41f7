"""Pages that are one file: no script, nothing fetched, light and dark by the reader's own setting.

Reports are built from the few pieces here. Every piece takes plain text and escapes it, and returns :class:`Markup`,
so that no model's output or file name can become markup of the page.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

CHART_COLOURS = (  # light, dark
    ("#0d6b68", "#4cbcb1"),
    ("#c05a1c", "#f0a36b"),
    ("#3f5fb0", "#8fb0f5"),
    ("#8a3b78", "#d59acb"),
    ("#6d6f16", "#c9c46a"),
    ("#a8382f", "#f08a72"),
)


class Markup(str):
    """HTML that is safe to put into a page as it is."""

    __slots__ = ()


def text(value: object) -> Markup:
    """``value`` as text: escaped, and without control characters, which HTML does not allow."""
    if isinstance(value, Markup):
        return value
    allowed = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in str(value))
    return Markup(html.escape(allowed))


def page(title: str, *, kicker: str, lead: str, body: Iterable[Markup]) -> str:
    """A whole document: ``kicker`` stands small above the title and ``lead`` below it."""
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        f'<header><p class="kicker">{text(kicker)}</p><h1>{text(title)}</h1><p class="lead">{text(lead)}</p></header>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def section(title: str, *content: Markup) -> Markup:
    """A headed part of the page."""
    return Markup(f"<section><h2>{text(title)}</h2>{''.join(content)}</section>")


def tiles(items: Sequence[tuple[str, str, str]]) -> Markup:
    """The figures that matter, each with its name and a note."""
    cells = "".join(
        f'<div class="tile"><dt>{text(name)}</dt><dd>{text(value)}</dd><p>{text(note)}</p></div>'
        for name, value, note in items
    )
    return Markup(f'<dl class="tiles">{cells}</dl>')


def figures(charts: Sequence[tuple[str, str, Markup]]) -> Markup:
    """Charts with a title and a note each; the first is as wide as the page."""
    cells = "".join(
        f'<figure class="card"><figcaption><b>{text(title)}</b><span>{text(note)}</span></figcaption>{chart}</figure>'
        for title, note, chart in charts
    )
    return Markup(f'<div class="charts">{cells}</div>')


def note(content: object) -> Markup:
    """A paragraph of running text."""
    return Markup(f'<p class="note">{text(content)}</p>')


def facts(items: Mapping[str, object]) -> Markup:
    """Names and values, one pair a line."""
    lines = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in items.items())
    return Markup(f'<dl class="card facts">{lines}</dl>')


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    prose: bool = False,
    words: int = 1,
    total: Sequence[object] = (),
) -> Markup:
    """A table; with ``prose`` its cells hold running text that wraps, else figures but for the first ``words``.

    ``total`` is a row below the others.
    """

    def line(cells: Sequence[object], tag: str = "td") -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = [' class="words"' if place < words else "" for place in range(len(cells))]
        return "".join(f"<{tag}{scope}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    lines = "".join(f"<tr>{line(row)}</tr>" for row in rows)
    content = f"<thead><tr>{line(head, 'th')}</tr></thead><tbody>{lines}</tbody>"
    if total:
        content += f"<tfoot><tr>{line(total)}</tr></tfoot>"
    kind = "prose" if prose else "numbers"
    return Markup(f'<div class="card scroll"><table class="{kind}">{content}</table></div>')


def folded(summary: str, content: Markup) -> Markup:
    """Something to open when wanted."""
    return Markup(f'<details class="card"><summary>{text(summary)}</summary>{content}</details>')


def code(content: str) -> Markup:
    """Text in which every space counts."""
    return Markup(f"<pre>{text(content)}</pre>")


_CHART_VARIABLES = "".join(
    f"--chart-{index}:light-dark({light},{dark});" for index, (light, dark) in enumerate(CHART_COLOURS)
)

_STYLE = (
    ":root{color-scheme:light dark;--ground:light-dark(#f6f8f7,#101514);--card:light-dark(#fff,#18201e);"
    "--line:light-dark(#e1e8e5,#2a3532);--text:light-dark(#17211f,#e5ecea);--soft:light-dark(#55645f,#9dada8);"
    "--accent:light-dark(#0d6b68,#4cbcb1);--shadow:0 1px 2px light-dark(#0f2a2510,#0006),0 6px 24px "
    "light-dark(#0f2a250a,#0003);" + _CHART_VARIABLES + "--sans:-apple-system,'Segoe UI',Roboto,'Noto Sans',Inter,"
    "'Liberation Sans','PingFang SC','Hiragino Sans GB','Microsoft YaHei','Noto Sans CJK SC',system-ui,sans-serif;"
    "--mono:ui-monospace,'SF Mono','Cascadia Code',Menlo,Consolas,'Liberation Mono','Noto Sans CJK SC',monospace}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:400 1rem/1.6 var(--sans);
-webkit-font-smoothing:antialiased}
main{max-width:68rem;margin:0 auto;padding:3.5rem 1.5rem 5rem}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;font-weight:600;margin:2.75rem 0 .9rem;letter-spacing:-.005em}
p{margin:0}
.kicker{font-size:.78rem;letter-spacing:.09em;text-transform:uppercase;color:var(--accent);font-weight:600}
.lead{color:var(--soft);max-width:46rem}
.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;box-shadow:var(--shadow)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.6rem,1fr));gap:.9rem;margin:2rem 0 0}
.tile{padding:1rem 1.15rem;margin:0}
.tile dt{font-size:.82rem;color:var(--soft)}
.tile dd{margin:.1rem 0;font-size:1.55rem;line-height:1.25;font-weight:600;letter-spacing:-.015em;
font-variant-numeric:tabular-nums}
.tile p{font-size:.8rem;color:var(--soft);line-height:1.4}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.9rem}
.charts figure{margin:0;padding:1.1rem 1.2rem .6rem;min-width:0}
.charts figure:first-child{grid-column:1/-1}
figcaption{display:flex;justify-content:space-between;gap:1rem;align-items:baseline;flex-wrap:wrap;margin-bottom:.3rem}
figcaption b{font-weight:600;font-size:.95rem}
figcaption span{font-size:.82rem;color:var(--soft)}
svg.chart{display:block;width:100%;height:auto}
svg.chart text{font-family:var(--sans)!important}
.facts{margin:0;padding:.5rem 1.25rem}
.facts div{display:grid;grid-template-columns:minmax(8rem,14rem) 1fr;gap:1rem;padding:.5rem 0;
border-bottom:1px solid var(--line)}
.facts div:last-child{border-bottom:0}
.facts dt{color:var(--soft);font-size:.9rem}
.facts dd{margin:0;font-size:.9rem;white-space:pre-wrap;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);text-align:left;font-size:.82rem}
th,td{padding:.6rem 1.2rem;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
.numbers th,.numbers td{text-align:right;white-space:nowrap}
.numbers .words{text-align:left;white-space:normal;max-width:15rem;overflow-wrap:break-word}
tfoot td{font-weight:600;border-top:1px solid var(--line);border-bottom:0}
.note{color:var(--soft);font-size:.9rem;margin:.2rem 0 .9rem;overflow-wrap:anywhere}
.prose td{white-space:pre-wrap;overflow-wrap:anywhere}
.prose td:first-child{white-space:nowrap;color:var(--soft)}
section>.card+.card,.charts+.card,.charts+.charts,.card+.note,.tiles+.note{margin-top:.9rem}
.facts+.facts{border-top:1px solid var(--line)}
details{margin-top:.9rem;overflow:hidden}
details>summary{cursor:pointer;padding:.85rem 1.2rem;font-size:.92rem;font-weight:500}
details>summary::marker{color:var(--soft)}
details[open]>summary{border-bottom:1px solid var(--line)}
details .card{border:0;border-radius:0;box-shadow:none;background:none}
details>*+*{margin:0}
pre{margin:0;padding:1rem 1.2rem;overflow-x:auto;font:.82rem/1.6 var(--mono)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:46rem){main{padding:2rem 1rem 3rem}.charts{grid-template-columns:minmax(0,1fr)}h1{font-size:1.6rem}
.facts div{grid-template-columns:1fr;gap:0}}
@media print{body{background:#fff}.card,.tile{box-shadow:none;break-inside:avoid}}
"""
)
