"""``report.html`` beside prepared data: before and after, what was dropped and why, from the manifest's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.page import Markup, code, figures, note, page, section, table, tiles
from gale.data.report_plots import charts

REPORT = "report.html"
_TOTALS = ("files", "read", "read_bytes", "kept", "kept_bytes", "documents", "tokens")
_MOST_SAMPLES = 200


def write_report(folder: Path, manifest: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write ``folder/report.html``, one file that needs nothing else."""
    sources: list[dict[str, Any]] = manifest["sources"]
    total = {key: sum(source[key] for source in sources) for key in _TOTALS}
    lead = (
        f"{total['read']:,} documents were read and {total['kept']:,} kept, which make {total['documents']:,} "
        f"documents and {total['tokens']:,} tokens after repeating or leaving out what the recipe says."
    )
    body = _sections(manifest, sources, total, samples)
    files.write_text(folder / REPORT, page("Prepared data", kicker="Gale · data", lead=lead, body=body))


def _sections(
    manifest: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    total: Mapping[str, int],
    samples: Sequence[Mapping[str, Any]],
) -> Iterator[Markup]:
    reasons, languages, redacted = _reasons(sources), _summed(sources, "languages"), _summed(sources, "redacted")
    share = _percent(total["kept"], total["read"])
    yield tiles(
        [
            ("Read", _size(total["read_bytes"]), f"{total['read']:,} documents"),
            ("Kept", _size(total["kept_bytes"]), f"{total['kept']:,} documents" + (f", {share}%" if share else "")),
            ("To train on", f"{total['tokens']:,}", f"tokens in {total['documents']:,} documents"),
        ]
    )
    yield note(f"Fingerprint {manifest['fingerprint']}")
    yield section("Before and after", figures(charts(sources, reasons, languages)))
    yield section("Sources", _sources(manifest, sources, total))
    yield section("Dropped", _counts(sources, reasons, _dropped) if reasons else note("Nothing."))
    if redacted:
        yield section("Redacted", _counts(sources, redacted, lambda source, name: source["redacted"].get(name, 0)))
    if evaluations := manifest["evaluations"]:
        head = ["file", "texts", "too short to look for", "training documents dropped"]
        rows = [[e["file"], *(f"{e[key]:,}" for key in ("texts", "too_short", "dropped"))] for e in evaluations]
        yield section("Kept apart from evaluations", table(head, rows))
    if broken := [source for source in sources if source["broken_lines"]]:
        content: list[Markup] = []
        for source in broken:
            content.append(note(f"{source['file']}: {source['broken_lines']:,}, the first of them:"))
            content.append(code("\n".join(source["first_broken_lines"])))
        yield section("Rows that could not be read", *content)
    if samples:
        about = "Their beginnings, or the words they share with an evaluation, with personal data redacted. "
        rows = [[sample["source"], _reason(sample), sample["excerpt"]] for sample in samples[:_MOST_SAMPLES]]
        yield section(
            "Samples of what was dropped",
            note(about + "All of them are in dropped.jsonl."),
            table(["source", "reason", "text"], rows, prose=True),
        )


def _sources(manifest: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], total: Mapping[str, int]) -> Markup:
    def figures_of(counts: Mapping[str, Any], weight: str, epochs: str, share: str) -> list[str]:
        files_, read, kept, documents, tokens = (
            f"{counts[key]:,}" for key in ("files", "read", "kept", "documents", "tokens")
        )
        return [files_, read, kept, _percent(counts["kept"], counts["read"]), weight, epochs, documents, tokens, share]

    head = ["source", "licence", "origin", "split", "files", "read", "kept", "kept, %", "weight", "epochs", "documents"]
    rows = []
    for source in sources:
        weight = "" if source["weight"] is None else f"{source['weight']:g}"
        share = _percent(source["tokens"], manifest["splits"][source["split"]]["tokens"])
        words = [source[key] for key in ("file", "licence", "origin", "split")]
        rows.append([*words, *figures_of(source, weight, f"{source['epochs']:.4g}", share)])
    everything = ["all", "", "", "", *figures_of(total, "", "", "")]
    return table([*head, "tokens", "share of split, %"], rows, words=4, total=everything)


def _counts(sources: Sequence[Mapping[str, Any]], names: Counter[str], count: Any) -> Markup:
    """How many of each name a source had, the commonest first."""
    ordered = names.most_common()
    rows = [[source["file"], *(f"{count(source, name):,}" for name, _ in ordered)] for source in sources]
    total = ["all", *(f"{number:,}" for _, number in ordered)]
    return table(["source", *(name for name, _ in ordered)], rows, total=total)


def _dropped(source: Mapping[str, Any], name: str) -> int:
    return int(source["dropped"].get(name) or source.get(name) or 0)


def _reason(sample: Mapping[str, Any]) -> str:
    like = sample.get("like")
    return f"{sample['reason']}: {like.rpartition('/')[2]}" if like else str(sample["reason"])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else ""


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
