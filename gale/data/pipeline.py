"""What is done to a batch of rows, wherever it is done: here, in a process beside this one, or on a Ray cluster.

rows -> documents -> normalise -> redact -> language -> quality -> decontaminate -> sketch and tokens

A batch knows nothing of other batches, so the result does not depend on who works on it. What looks at all documents
together (duplicates, mixing, packing) is left to :mod:`gale.data.prepare`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import gale
from gale.core.errors import DataError
from gale.data.clean import fingerprint, normalise_document
from gale.data.cleaning_recipe import PersonalData, Step
from gale.data.decontamination import ContaminationIndex
from gale.data.encode import DocumentEncoder
from gale.data.languages import identify, rejected
from gale.data.mixing import Encoded, copies
from gale.data.near_duplicates import sketch
from gale.data.personal_data import redact
from gale.data.quality import broken_rules, without_notices
from gale.data.readers import BrokenRowError, Row
from gale.data.recipe import DataRecipe, Source
from gale.data.sources import Document, row_document
from gale.data.text_units import TextUnits
from gale.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rensa import RMinHash

EXCERPT = 300  # characters shown of a dropped document
_SAMPLES = 3  # of what one batch drops for one reason
_ALL_PERSONAL_DATA = PersonalData(ip=True)
# Whose version can change what comes out.
_LIBRARIES = ("tokenizers", "rensa", "py3langid", "trafilatura", "numpy")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one source, or documents already drawn from its rows, each with its place."""

    source: int
    rows: tuple[Row | tuple[str, Document], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """The beginning of a dropped document, or what it shares with an evaluation; personal data is redacted.

    ``like`` is the place of the document, or the name of the evaluation file, that it is too close to.
    """

    reason: str
    place: str
    excerpt: str
    like: str | None = None


@dataclass(slots=True)
class Kept:
    """A document that came through."""

    place: str
    digest: bytes
    size: int
    excerpt: str
    sketch: RMinHash | None = None
    encoded: tuple[Encoded, ...] = ()  # nothing where the epochs leave it out, two where it is a preference

    @property
    def chance(self) -> float:
        """A number in [0, 1) drawn from the document's content."""
        return int.from_bytes(self.digest[:8], "big") / 2**64


@dataclass(slots=True)
class BatchResult:
    """What became of a batch: the kept documents in order, and what was counted."""

    source: int
    kept: list[Kept] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)

    def drop(self, reason: str, place: str, text: str, *, like: str | None = None) -> None:
        """Count a document that is dropped and show its beginning, if there are not enough such samples yet."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= _SAMPLES:
            self.samples.append(sample(reason, place, text, like))


def versions() -> dict[str, str]:
    """Versions that have to be the same wherever batches are worked on."""
    return {"gale": gale.__version__, **{name: version(name) for name in _LIBRARIES}}


@dataclass(frozen=True, slots=True)
class Job:
    """All that working on batches takes; it can be sent to another process or machine."""

    recipe: DataRecipe
    tokenizer_files: dict[str, bytes]
    evaluations: ContaminationIndex | None = None
    versions: dict[str, str] = field(default_factory=versions)


class BatchWorker:
    """Works on batches of one job. Raises :class:`DataError` where this machine's libraries are not the job's."""

    def __init__(self, job: Job) -> None:
        here = versions()
        if unlike := [name for name, wanted in job.versions.items() if here[name] != wanted]:
            raise DataError(
                f"A worker has {unlike[0]} {here[unlike[0]]}, not {job.versions[unlike[0]]}.",
                hint="Install the same version of Gale on every machine.",
            )
        self._recipe, self._evaluations = job.recipe, job.evaluations
        with tempfile.TemporaryDirectory() as folder:
            for name, content in job.tokenizer_files.items():
                (Path(folder) / name).write_bytes(content)
            self._encoder = DocumentEncoder(Tokenizer.load(Path(folder)))

    def __call__(self, batch: Batch) -> BatchResult:
        """Clean and tokenise a batch."""
        source = self._recipe.sources[batch.source]
        result = BatchResult(batch.source)
        documents: list[tuple[Document, Kept]] = []
        for row in batch.rows:
            try:
                place, document = (
                    (row.place, row_document(row, source, self._recipe.replace)) if isinstance(row, Row) else row
                )
            except BrokenRowError as error:
                assert isinstance(row, Row)
                result.broken.append((row.place, str(error)))
                continue
            if document is not None and (cleaned := self._clean(place, document, source, result)):
                documents.append(cleaned)
        result.kept = [kept for _, kept in documents]
        # Text that the epochs leave out need not be encoded; with weights, nobody knows yet what that is.
        chosen = [
            (document, kept)
            for document, kept in documents
            if source.weight is not None or copies(kept.chance, source.epochs)
        ]
        encoded = self._encoder.encode([half for document, _ in chosen for half in document.halves()])
        for document, kept in chosen:
            kept.encoded = tuple(
                (np.asarray(ids, np.uint32), np.asarray(trained, np.bool_))
                for ids, trained in itertools.islice(encoded, len(document.halves()))
            )
        return result

    def _clean(
        self, place: str, document: Document, source: Source, result: BatchResult
    ) -> tuple[Document, Kept] | None:
        """One document through all steps that need no other; None where it is dropped, with the reason counted."""
        recipe = self._recipe
        size = document.size
        result.counts.update(read=1, read_bytes=size)
        result.sizes[size.bit_length()] += 1
        normalised = normalise_document(document)
        if normalised is None:
            result.counts["empty"] += 1
            return None
        document = normalised
        if (personal := recipe.personal_data) and _goes_through("personal_data", source):
            document = document.map(lambda text: _redacted(text, personal, result.redacted))
        joined = document.joined
        language = ""
        if recipe.languages or recipe.quality:
            language, confidence = identify(joined)
            result.languages[language] += 1
            if (
                recipe.languages
                and _goes_through("languages", source)
                and (reason := rejected(recipe.languages, language, confidence))
            ):
                result.drop(reason, place, joined)
                return None
        units = TextUnits(joined)
        if recipe.quality and source.format == "text" and _goes_through("quality", source):
            if recipe.quality.drop_notice_lines:
                joined, cut = without_notices(joined)
                if cut:
                    result.counts["notice_lines"] += cut
                    if not joined:
                        result.counts["empty"] += 1
                        return None
                    document, units = Document(text=joined), TextUnits(joined)
            if reason := next(broken_rules(joined, units, language, recipe.quality), None):
                result.drop(reason, place, joined)
                return None
        if (
            self._evaluations
            and source.split == "train"
            and _goes_through("decontamination", source)
            and (overlap := self._evaluations.overlap(units))
        ):
            file, shared = overlap
            result.contaminated[file] += 1
            result.drop("contaminated", place, f"… {shared} …", like=file)
            return None
        kept = Kept(place, fingerprint(document), document.size, joined[:EXCERPT])
        if recipe.near_duplicates and source.format != "qa" and _goes_through("near_duplicates", source):
            kept.sketch = sketch(units, recipe.near_duplicates)
        return document, kept


def sample(reason: str, place: str, excerpt: str, like: str | None = None) -> Sample:
    """A sample to show, with every kind of personal data redacted, whatever the recipe keeps."""
    return Sample(reason, place, redact(excerpt[:EXCERPT], _ALL_PERSONAL_DATA)[0], like)


def _goes_through(step: Step, source: Source) -> bool:
    return step not in source.skip


def _redacted(text: str, recipe: PersonalData, counts: Counter[str]) -> str:
    text, found = redact(text, recipe)
    counts.update(found)
    return text
