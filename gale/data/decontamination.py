"""Training documents that share an n-gram with an evaluation file, after GPT-3 (Brown et al. 2020, appendix C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gale.core.errors import DataError
from gale.data.clean import normalise
from gale.data.cleaning_recipe import Decontamination, EvaluationFiles
from gale.data.readers import BrokenRowError, read_rows
from gale.data.source_files import find_files
from gale.data.text_units import TextUnits


@dataclass(frozen=True, slots=True)
class ContaminationIndex:
    """Sorted n-gram hashes of all evaluation files, by n, each with the number of the first file that has it."""

    names: tuple[str, ...]
    hashes: dict[int, npt.NDArray[np.uint64]]
    owners: dict[int, npt.NDArray[np.int64]]

    def overlap(self, units: TextUnits) -> tuple[str, str] | None:
        """An evaluation file that the text shares an n-gram with, and the n-gram; None where there is none.

        A text is compared at every n for which there are evaluation n-grams, so that a Chinese passage within an
        English document is found too.
        """
        for n, known in self.hashes.items():
            ngrams = units.ngrams(n)
            found = np.sort(ngrams)  # neighbours are looked up faster than strangers
            at = np.minimum(np.searchsorted(known, found), len(known) - 1)
            hits = np.flatnonzero(known[at] == found)
            if len(hits):
                start = int(np.flatnonzero(ngrams == found[hits[0]])[0])
                shared = units.units[start : start + n]
                return self.names[int(self.owners[n][at[hits[0]]])], ("" if units.spaceless else " ").join(shared)
        return None


def index_evaluations(recipe: Decontamination) -> tuple[ContaminationIndex, list[dict[str, Any]]]:
    """The index of all evaluation texts, and a report a file: texts, n-grams, texts too short to look for.

    Raises :class:`DataError` for files that are missing or damaged, or where there is nothing to look for.
    """
    names: list[str] = []
    reports: list[dict[str, Any]] = []
    hashes: dict[int, list[npt.NDArray[np.uint64]]] = {}
    owners: dict[int, list[npt.NDArray[np.int64]]] = {}
    for files in recipe.against:
        counts = Counter(dict.fromkeys(("texts", "ngrams", "too_short"), 0))
        for text in _texts(files):
            units = TextUnits(normalise(text))
            n = recipe.characters if units.spaceless else recipe.words
            ngrams = units.ngrams(n)
            counts["texts"] += 1
            counts["ngrams"] += len(ngrams)
            if len(ngrams):
                hashes.setdefault(n, []).append(ngrams)
                owners.setdefault(n, []).append(np.full(len(ngrams), len(names)))
            else:
                counts["too_short"] += 1
        if not counts["ngrams"]:
            raise DataError(
                f"{files.path} holds no text that is long enough to be looked for in the training data.",
                hint=f"Check its `keys`, or lower `words` ({recipe.words}) and `characters` ({recipe.characters}).",
            )
        names.append(files.path.name)
        reports.append({"file": files.path.name, "sha256": find_files(files.path, files.kind).sha256(), **counts})
    index = ContaminationIndex(tuple(names), {}, {})
    for n in sorted(hashes):
        joined = np.concatenate(hashes[n])
        index.hashes[n], first = np.unique(joined, return_index=True)
        index.owners[n] = np.concatenate(owners[n])[first]
    return index, reports


def _texts(files: EvaluationFiles) -> Iterator[str]:
    """All texts in the rows of the files, each value on its own."""
    for file in find_files(files.path, files.kind).files:
        for row in read_rows(file):
            try:
                content = row.parse()
            except BrokenRowError as error:
                raise DataError(f"{row.place}: {error}") from error
            if missing := [key for key in files.keys if key not in content]:
                raise DataError(
                    f"{row.place}: {missing[0]!r} is missing.", hint="Check `keys` of [[decontamination.against]]."
                )
            for key, value in content.items():
                if not files.keys or key in files.keys:
                    yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
