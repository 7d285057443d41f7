"""Texts with labels: which rows of which files, cut into parts by their content, and batches of them by number.

Row g of a run is the same whatever came before, as of every other kind of data. A text belongs to training,
calibration or validation by its own digest, so it stays where it is when files grow or change their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from gale.core.errors import DataError
from gale.core.recipe import Recipe
from gale.data.readers import BrokenRowError, read_rows
from gale.data.readers import Row as FileRow
from gale.data.source_files import find_files, missing_paths
from gale.text.tokenizer import Tokenizer
from gale.train.batches import IGNORED, Batch

Row = TypeVar("Row")

UNKNOWN = np.nan
_SHOWN = 20


class When(Recipe):
    """A row has a label where the value of ``key`` is one of ``values``."""

    key: str
    values: tuple[str | int, ...] = Field(min_length=1)


class LabelledSource(Recipe):
    """Files of rows, and what their rows say about each label."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Under which its figures are shown.")
    path: Path = Field(description="JSON lines or Parquet, plain or packed.")
    licence: str = Field(min_length=1)
    origin: str = Field(min_length=1, description="Where the rows come from.")
    text: str = Field(default="{text}", description="Template of the text: {text}, {messages[0][content]}.")
    labels: dict[str, bool | When] = Field(
        description="For each label when a row has it, or true or false for all rows; what is not named is unknown."
    )
    limit: int | None = Field(default=None, ge=1, description="Take this many rows, evenly spread over the files.")


class LabelledData(Recipe):
    """The file that ``data`` of ``gale train classifier`` names."""

    labels: tuple[str, ...] = Field(min_length=1, description="In the order of the classifier's outputs.")
    sources: tuple[LabelledSource, ...] = Field(min_length=1)
    leave_out: tuple[Path, ...] = Field(
        default=(), description='Files to report on later: rows with a "text" of theirs are not trained on.'
    )
    calibration_share: float = Field(default=0.05, gt=0, lt=0.5, description="Of the rows, for calibration alone.")
    validation_share: float = Field(default=0.05, gt=0, lt=0.5, description="Of the rows, to follow training.")

    @model_validator(mode="after")
    def _labels_are_known(self) -> LabelledData:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: one is named twice")
        if unknown := sorted({name for source in self.sources for name in source.labels} - set(self.labels)):
            raise ValueError(f"sources: {unknown[0]!r} is none of the labels {', '.join(self.labels)}")
        return self


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text's tokens, and for each label 1, 0 or :data:`UNKNOWN`; ``place`` names its file and line."""

    place: str
    source: str
    ids: list[int]
    labels: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """Rows by what they are for; ``counts`` says how many were read, empty, the same as another, or left out."""

    training: list[LabelledRow] = field(default_factory=list)
    calibration: list[LabelledRow] = field(default_factory=list)
    validation: list[LabelledRow] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """SHA-256 over all tokens and labels, part by part."""
        digest = hashlib.sha256()
        for rows in (self.training, self.calibration, self.validation):
            for row in rows:
                digest.update(repr((row.ids, row.labels)).encode())
            digest.update(b"|")
        return digest.hexdigest()


def read_labelled(data: LabelledData, tokenizer: Tokenizer, *, row_tokens: int) -> Parts:
    """All rows of ``data``, each text once and cut to its first ``row_tokens`` tokens.

    Raises :class:`DataError` naming the file and line of a row that cannot be used, and where a part is empty.
    """
    if missing := missing_paths([source.path for source in data.sources] + list(data.leave_out)):
        raise DataError(f"These data files do not exist: {', '.join(missing)}", hint="Check the paths in the recipe.")
    reported = {_digest(_filled("{text}", row, place)) for path in data.leave_out for place, row in _rows(path)}
    seen: set[bytes] = set()
    parts = Parts()
    for source in data.sources:
        counts = parts.counts[source.name] = dict.fromkeys(("read", "empty", "same", "left_out", "kept"), 0)
        for place, row in spread(list(_rows(source.path)), source.limit):
            counts["read"] += 1
            text = _filled(source.text, row, place)
            digest = _digest(text)
            ids = tokenizer.encode(text)[:row_tokens]
            fate = "empty" if not ids else "left_out" if digest in reported else "same" if digest in seen else "kept"
            counts[fate] += 1
            if fate != "kept":
                continue
            seen.add(digest)
            labels = tuple(_label(source, name, row, place) for name in data.labels)
            share = int.from_bytes(digest[:8]) / 2**64
            part = (
                parts.calibration
                if share < data.calibration_share
                else parts.validation
                if share < data.calibration_share + data.validation_share
                else parts.training
            )
            part.append(LabelledRow(place, source.name, ids, labels))
    for name in ("training", "calibration", "validation"):
        if not getattr(parts, name):
            raise DataError(f"No row is left for {name}.", hint="Give more rows, or raise its share.")
    return parts


def spread(rows: list[Row], most: int | None) -> list[Row]:
    """``most`` of ``rows``, evenly spread over them, as files are often sorted; all where there are no more."""
    if most is None or most >= len(rows):
        return rows
    return [rows[place * len(rows) // most] for place in range(most)]


class LabelledRows:
    """Rows of one part, shuffled anew each epoch."""

    def __init__(self, rows: list[LabelledRow], *, seed: int) -> None:
        self.rows, self._seed = rows, seed

    def number(self, n: int) -> LabelledRow:
        """Row n of the endless sequence of epochs."""
        epoch, place = divmod(n, len(self.rows))
        return self.rows[int(self._order(epoch)[place])]

    def batch(self, first_row: int, rows: int) -> tuple[Batch, Tensor]:
        """Rows ``first_row`` to ``first_row + rows``, a piece each, and their labels [rows, labels]."""
        chosen = [self.number(row) for row in range(first_row, first_row + rows)]
        lengths = [len(row.ids) for row in chosen]
        ids_N = torch.from_numpy(np.concatenate([np.array(row.ids, np.int64) for row in chosen]))
        positions_N = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
        labels = torch.tensor([row.labels for row in chosen])
        return Batch(ids_N, torch.full_like(ids_N, IGNORED), positions_N, lengths), labels

    def describe(self, first_row: int, rows: int) -> str:
        """Where these rows stand in their files."""
        places = [self.number(row).place for row in range(first_row, first_row + rows)]
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        return f"rows {first_row} to {first_row + rows - 1}: {', '.join(places[:_SHOWN])}{more}"

    @lru_cache(maxsize=2)  # noqa: B019 (one object lives as long as the run)
    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.rows))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in find_files(path).files:
        for row in read_rows(file):
            yield row.place, _parsed(row)


def _parsed(row: FileRow) -> dict[str, Any]:
    try:
        return row.parse()
    except BrokenRowError as error:
        raise DataError(f"{row.place}: {error}") from error


def _filled(template: str, row: dict[str, Any], place: str) -> str:
    try:
        return template.format(**row)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        raise DataError(
            f"{place}: the template {template!r} cannot be filled: {error!r}.",
            hint=f"The row has the keys {', '.join(sorted(row))}.",
        ) from error


def _label(source: LabelledSource, label: str, row: dict[str, Any], place: str) -> float:
    rule = source.labels.get(label)
    if rule is None:
        return UNKNOWN
    if isinstance(rule, bool):
        return float(rule)
    if rule.key not in row:
        raise DataError(f"{place}: the row has no key {rule.key!r}.", hint=f"It has {', '.join(sorted(row))}.")
    return float(row[rule.key] in rule.values)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
