"""``gale data prepare``: sources -> documents -> clean -> deduplicate -> mix -> shards with a manifest and a report."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.errors import DataError
from gale.core.progress import Bar
from gale.core.recipe import load_recipe
from gale.data.cache import is_recipe, made_once
from gale.data.clean import ExactDeduplicator
from gale.data.decontamination import index_evaluations
from gale.data.languages import check_languages
from gale.data.mixing import EncodedDocument, Spool, copies, resolve_epochs
from gale.data.near_duplicates import NearDeduplicator
from gale.data.pipeline import Batch, BatchResult, Job, Kept
from gale.data.readers import OnRead, Row
from gale.data.recipe import DataRecipe
from gale.data.report import write_report
from gale.data.shards import MANIFEST, ShardWriter
from gale.data.shards import fingerprint as shards_fingerprint
from gale.data.source_files import FoundFiles, find_files, missing_paths
from gale.data.source_report import SourceReport
from gale.data.sources import BrokenRows, Document, question_documents, source_rows
from gale.data.tokenizer_training import ready_tokenizer
from gale.data.workers import map_here, map_in_processes, map_on_ray, workers_for
from gale.text.tokenizer import Tokenizer

SAMPLES = "dropped.jsonl"
_BATCH_ROWS = 512
_BATCH_BYTES = 2**21
_MIB = 2**20


def prepare(recipe: DataRecipe, out: Path, *, ray: str | None = None) -> dict[str, Any]:
    """Write the shards to ``out`` (which appears only when all is done) and return the manifest.

    ``ray`` is the address of a Ray cluster to clean and tokenise on, in place of this machine's cores; the shards are
    the same to the byte wherever that is done.
    Raises :class:`DataError` for sources that are missing, damaged or leave a split empty.
    """
    found = _found_files(recipe)
    if recipe.languages:
        check_languages(recipe.languages)
    tokenizer = Tokenizer.load(ready_tokenizer(recipe.tokenizer))
    evaluations, evaluation_reports = (
        index_evaluations(recipe.decontamination) if recipe.decontamination else (None, [])
    )
    with files.new_directory(out, marker=MANIFEST) as folder:
        tokenizer.save(folder / "tokenizer")
        job = Job(recipe, {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}, evaluations)
        run = _Run(recipe, found, folder, tokenizer.vocabulary_size)
        size = sum(each.size for each in found)
        with Bar("Preparing (MiB)", -(-size // _MIB)) as bar:
            progress = _Progress(bar, run)
            batches = run.batches(progress.count)
            workers = workers_for(recipe.workers, size)
            if ray is not None:
                results = map_on_ray(job, batches, ray)
            elif workers > 1:
                results = map_in_processes(job, batches, workers)
            else:
                results = map_here(job, batches)
            with contextlib.closing(results):  # an error must end the workers now, not when it has been handled
                for result in results:
                    run.take(result)
            run.finish()
            progress.finish(-(-size // _MIB))
        manifest: dict[str, Any] = {
            "format": 1,
            "fingerprint": shards_fingerprint(folder),
            "tokenizer_sha256": files.sha256(folder / "tokenizer" / "tokenizer.json"),
            "vocabulary_size": tokenizer.vocabulary_size,
            "splits": run.splits(),
            "sources": [report.as_dict() for report in run.reports_in_order()],
            "evaluations": [
                {**report, "dropped": sum(source.contaminated[report["file"]] for source in run.reports_in_order())}
                for report in evaluation_reports
            ],
            "recipe": recipe.model_dump(mode="json"),
        }
        files.write_json(folder / MANIFEST, manifest)
        samples = [
            {"source": report.name, **asdict(sample)} for report in run.reports_in_order() for sample in report.samples
        ]
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        files.write_text(folder / SAMPLES, "".join(lines))
        write_report(folder, manifest, samples)
    return manifest


def ready_data(path: Path) -> Path:
    """The folder of prepared data that ``path`` is, or that the data recipe ``path`` makes."""
    if not is_recipe(path):
        return path
    recipe = load_recipe(path, DataRecipe)
    recipe = recipe.model_copy(update={"tokenizer": ready_tokenizer(recipe.tokenizer)})
    return made_once(recipe, prepare, kind="data", marker=MANIFEST)


class _Run:
    """What one preparation has come to: reports, duplicates seen, and the splits being written."""

    def __init__(self, recipe: DataRecipe, found: list[FoundFiles], folder: Path, vocabulary_size: int) -> None:
        self._recipe, self._folder, self._vocabulary_size = recipe, folder, vocabulary_size
        # Held-out splits come first, so that a document in both is dropped from training, not from the evaluation.
        self._order = sorted(range(len(recipe.sources)), key=lambda index: recipe.sources[index].split == "train")
        self._reports = [SourceReport(source, each) for source, each in zip(recipe.sources, found, strict=True)]
        self._broken = [BrokenRows(source) for source in recipe.sources]
        self._seen = ExactDeduplicator()
        self._near = NearDeduplicator(recipe.near_duplicates) if recipe.near_duplicates else None
        self._writers = {
            recipe.sources[index].split: ShardWriter(
                folder,
                recipe.sources[index].split,
                vocabulary_size=vocabulary_size,
                shard_tokens=recipe.shard_tokens,
            )
            for index in self._order
        }
        self._bytes = dict.fromkeys(self._writers, 0)
        self._spools: dict[int, Spool] = {}
        self.note = ""

    def batches(self, on_read: OnRead) -> Iterator[Batch]:
        """All rows of all sources, in batches of one source each."""
        for index in self._order:
            source = self._recipe.sources[index]
            rows: list[Row | tuple[str, Document]] = []
            size = 0
            for row in (
                question_documents(source, self._recipe.seed, self._broken[index], on_read)
                if source.format == "qa"
                else source_rows(source, on_read)
            ):
                rows.append(row)
                size += row[1].size if isinstance(row, tuple) else row.size
                if len(rows) == _BATCH_ROWS or size > _BATCH_BYTES:
                    yield Batch(index, tuple(rows))
                    rows, size = [], 0
            if rows:
                yield Batch(index, tuple(rows))

    def take(self, result: BatchResult) -> None:
        """Count a batch, and write those of its documents that are new."""
        index, report = result.source, self._reports[result.source]
        for place, reason in result.broken:
            self._broken[index].add(place, reason)
        report.count(result)
        for document in result.kept:
            if self._is_new(document, report):
                report.keep(document)
                self._add(index, document)
        self.note = f"{report.name}: {report.counts['kept']:,} of {report.counts['read']:,} documents kept"

    def finish(self) -> None:
        """Resolve the weights, close the shards. Raises :class:`DataError` for a split without documents."""
        for spool in self._spools.values():
            spool.close()
        for report in self._reports:
            report.epochs = 0.0 if report.source.weight is not None else report.epochs
        weighted = sorted(self._spools)
        sources = [self._recipe.sources[index] for index in weighted]
        epochs = resolve_epochs(sources, [self._spools[index].tokens for index in weighted])
        for index, times in zip(weighted, epochs, strict=True):
            self._reports[index].epochs = times
            for document in self._spools[index].documents():
                self._write(index, document, times)
        if weighted:
            shutil.rmtree(self._folder / "spool")
        for report, broken in zip(self._reports, self._broken, strict=True):
            report.broken = broken
        for name, writer in self._writers.items():
            writer.close()
            if not writer.tokens:
                raise DataError(f"Nothing is left for the split {name!r}.", hint=self._why_nothing(name))

    def splits(self) -> dict[str, Any]:
        """The manifest's table of splits."""
        paired = {source.split for source in self._recipe.sources if source.format == "preference"}
        return {
            name: {
                "documents": writer.documents,
                "tokens": writer.tokens,
                "bytes": self._bytes[name],
                "shards": writer.shards,
                **({"pairs": True} if name in paired else {}),
            }
            for name, writer in self._writers.items()
        }

    def reports_in_order(self) -> list[SourceReport]:
        """The reports in the order in which the sources were read."""
        return [self._reports[index] for index in self._order]

    def _is_new(self, document: Kept, report: SourceReport) -> bool:
        if not self._seen.is_new(document.digest):
            report.drop_duplicate("duplicates", document)
            return False
        if (
            self._near
            and document.sketch is not None
            and (like := self._near.place_of_like(document.sketch, document.place))
        ):
            report.drop_duplicate("near_duplicates", document, like)
            return False
        return True

    def _add(self, index: int, document: Kept) -> None:
        if not document.encoded:
            return  # the epochs leave it out
        encoded = EncodedDocument(document.encoded, document.chance, document.size)
        source = self._recipe.sources[index]
        if source.weight is None:
            self._write(index, encoded, source.epochs)
            return
        if index not in self._spools:
            self._spools[index] = Spool(
                self._folder / "spool",
                f"source{index}",
                vocabulary_size=self._vocabulary_size,
                shard_tokens=self._recipe.shard_tokens,
            )
        self._spools[index].add(encoded)

    def _write(self, index: int, document: EncodedDocument, epochs: float) -> None:
        split = self._recipe.sources[index].split
        for _ in range(copies(document.chance, epochs)):
            self._bytes[split] += document.size
            for ids, trained in document.parts:
                self._writers[split].add(ids, trained)
                self._reports[index].counts.update(documents=1, tokens=len(ids), trained_tokens=int(trained.sum()))

    def _why_nothing(self, split: str) -> str:
        reports = [report for report in self._reports if report.source.split == split]
        read = sum(report.counts["read"] for report in reports)
        reasons = sum((report.reasons() for report in reports), start=Counter[str]())
        if not read:
            return "Its sources hold no documents."
        return f"Of {read:,} documents " + ", ".join(f"{count:,} were {name}" for name, count in reasons.most_common(4))


class _Progress:
    """Moves a bar by whole MiB as bytes are read."""

    def __init__(self, bar: Bar, run: _Run) -> None:
        self._bar, self._run = bar, run
        self._bytes = self._steps = 0

    def count(self, size: int) -> None:
        """``size`` more bytes are read."""
        self._bytes += size
        self.finish(self._bytes // _MIB)

    def finish(self, steps: int) -> None:
        """So many MiB are done."""
        if steps > self._steps:
            self._bar.advance(self._run.note, steps - self._steps)
            self._steps = steps


def _found_files(recipe: DataRecipe) -> list[FoundFiles]:
    """The files of every source. Raises :class:`DataError` naming all paths that lead nowhere."""
    if missing := missing_paths(source.path for source in recipe.sources):
        raise DataError(f"These data files do not exist: {', '.join(missing)}", hint="Check the paths in the recipe.")
    return [find_files(source.path, source.kind) for source in recipe.sources]
