"""What became of one source: the row of the manifest that the report is drawn from."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gale.data.pipeline import BatchResult, Kept, Sample, sample
from gale.data.recipe import Source
from gale.data.source_files import FoundFiles
from gale.data.sources import BrokenRows

_COUNTS = (
    *("read", "read_bytes", "empty", "notice_lines", "duplicates", "near_duplicates"),
    *("kept", "kept_bytes", "documents", "tokens", "trained_tokens"),
)
_SAMPLES = 5  # shown for each reason


class SourceReport:
    """Counts of one source, filled while it is prepared."""

    def __init__(self, source: Source, found: FoundFiles) -> None:
        self.source = source
        self.name = source.path.name
        self.epochs = source.epochs
        self.counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self.dropped: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.broken = BrokenRows(source)
        self._found = found
        self._redacted: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self.contaminated: Counter[str] = Counter()
        self._sizes_before: Counter[int] = Counter()
        self._sizes_after: Counter[int] = Counter()

    def count(self, result: BatchResult) -> None:
        """Add what one batch has come to."""
        self.counts.update(result.counts)
        self.dropped.update(result.dropped)
        self._redacted.update(result.redacted)
        self._languages.update(result.languages)
        self.contaminated.update(result.contaminated)
        self._sizes_before.update(result.sizes)
        for one in result.samples:
            self._show(one)

    def keep(self, document: Kept) -> None:
        """Count a document that stays."""
        self.counts.update(kept=1, kept_bytes=document.size)
        self._sizes_after[document.size.bit_length()] += 1

    def drop_duplicate(self, reason: str, document: Kept, like: str | None = None) -> None:
        """Count a document that was there before."""
        self.counts[reason] += 1
        if self._wanted(reason):
            self._show(sample(reason, document.place, document.excerpt, like))

    def reasons(self) -> Counter[str]:
        """How many documents went, and why."""
        others = {name: self.counts[name] for name in ("empty", "duplicates", "near_duplicates")}
        return +(self.dropped + Counter(others))

    def as_dict(self) -> dict[str, Any]:
        """The source's row in the manifest. Sizes are counted by the bits of their number: 10 is 512 to 1,023 bytes."""
        return {
            "file": self.name,
            "files": len(self._found.files),
            "ignored_files": len(self._found.ignored),
            "outside_links": len(self._found.outside),
            "sha256": self._found.sha256(),
            "licence": self.source.licence,
            "origin": self.source.origin,
            "split": self.source.split,
            "weight": self.source.weight,
            "epochs": self.epochs,
            **self.counts,
            "dropped": dict(self.dropped.most_common()),
            "contaminated": dict(self.contaminated.most_common()),
            "redacted": dict(self._redacted.most_common()),
            "languages": dict(self._languages.most_common()),
            "broken_lines": self.broken.count,
            "first_broken_lines": self.broken.first,
            "sizes_before": {str(bits): count for bits, count in sorted(self._sizes_before.items())},
            "sizes_after": {str(bits): count for bits, count in sorted(self._sizes_after.items())},
        }

    def _wanted(self, reason: str) -> bool:
        return sum(1 for one in self.samples if one.reason == reason) < _SAMPLES

    def _show(self, one: Sample) -> None:
        if self._wanted(one.reason):
            self.samples.append(one)
