"""Packed token shards: what training reads, memory-mapped, and the manifest that says what is in them.

A split (``train``, or a held-out one) is a row of shards, each three arrays in NumPy's ``.npy`` format: ``tokens``
(the documents' token ids one after another), ``trained`` (whether the model is trained to produce each token) and
``bounds`` (where each document begins, and the end). In a split with ``"pairs": true`` each two documents are one
preference: the same prompt with the chosen and with the rejected answer. ``manifest.json`` names sources, licences
and counts.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gale.core import files
from gale.core.errors import DataError

MANIFEST = "manifest.json"


class ShardWriter:
    """Collects one split's documents and writes a shard whenever ``shard_tokens`` are together."""

    def __init__(self, folder: Path, split: str, *, vocabulary_size: int, shard_tokens: int) -> None:
        self._folder, self._split, self._limit = folder, split, shard_tokens
        self._dtype = np.uint16 if vocabulary_size <= 2**16 else np.uint32
        self._tokens: list[npt.NDArray[Any]] = []
        self._trained: list[npt.NDArray[Any]] = []
        self._pending = 0
        self.shards: list[str] = []
        self.documents = 0
        self.tokens = 0

    def add(self, ids: npt.ArrayLike, trained: npt.ArrayLike) -> None:
        """Append a document."""
        self._tokens.append(np.asarray(ids, self._dtype))
        self._trained.append(np.asarray(trained, np.bool_))
        self.documents += 1
        self.tokens += len(self._tokens[-1])
        self._pending += len(self._tokens[-1])
        if self._pending >= self._limit:
            self.close()

    def close(self) -> None:
        """Write what is pending; the writer can go on afterwards."""
        if not self._tokens:
            return
        name = f"{self._split}-{len(self.shards):05d}"
        bounds = np.cumsum([0, *map(len, self._tokens)], dtype=np.int64)
        np.save(self._folder / f"{name}.tokens.npy", np.concatenate(self._tokens))
        np.save(self._folder / f"{name}.trained.npy", np.concatenate(self._trained))
        np.save(self._folder / f"{name}.bounds.npy", bounds)
        self.shards.append(name)
        self._tokens, self._trained, self._pending = [], [], 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard's arrays, mapped from disk."""

    tokens: npt.NDArray[Any]
    trained: npt.NDArray[np.bool_]
    bounds: npt.NDArray[np.int64]


def load_shard(folder: Path, name: str) -> Shard:
    """Map the arrays of one shard. Raises what NumPy raises for files that are missing or damaged."""
    return Shard(*(np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "trained", "bounds")))


class TokenSplit:
    """The documents of one split, by index."""

    def __init__(self, folder: Path, name: str) -> None:
        self.manifest = read_manifest(folder)
        splits = self.manifest["splits"]
        if name not in splits:
            raise DataError(f"{folder} has no split {name!r}.", hint=f"It has: {', '.join(sorted(splits))}.")
        self.name = name
        try:
            self.bytes: int = splits[name]["bytes"]
            self.pairs: bool = splits[name].get("pairs", False)  # documents 2n and 2n + 1: an answer and a worse one
            self._shards = [load_shard(folder, shard) for shard in splits[name]["shards"]]
            for shard in self._shards:
                if not shard.bounds[-1] == len(shard.tokens) == len(shard.trained):
                    raise ValueError("arrays of different lengths")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"The prepared data in {folder} is damaged: {error}", hint="Prepare it again.") from error
        self._ends = list(accumulate(len(shard.bounds) - 1 for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name_of(self, index: int) -> str:
        """How a person finds a document again: its number in the split and in the source that it came from."""
        first = 0
        for source in self.manifest.get("sources", []):
            if source["split"] == self.name:
                if index < first + source["documents"]:
                    return f"{self.name} {index} (number {index - first} kept of {source['file']})"
                first += source["documents"]
        return f"{self.name} {index}"

    def lengths(self) -> npt.NDArray[np.int64]:
        """Token count of every document."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(shard.bounds) for shard in self._shards)])

    def document(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Token ids and trained flags of one document."""
        shard_index = bisect.bisect_right(self._ends, index)
        shard = self._shards[shard_index]
        local = index - (self._ends[shard_index - 1] if shard_index else 0)
        low, high = int(shard.bounds[local]), int(shard.bounds[local + 1])
        return shard.tokens[low:high], shard.trained[low:high]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of prepared data. Raises :class:`DataError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} holds no prepared data.", hint="Make it with `gale data prepare RECIPE --out DIR`.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if lacking := {"fingerprint", "vocabulary_size", "splits"} - manifest.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (ValueError, AttributeError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}", hint="Prepare the data again.") from error
    return manifest


def fingerprint(folder: Path) -> str:
    """SHA-256 over all arrays of a folder of shards, by name."""
    return files.sha256_of_all(folder.glob("*.npy"))


def verify(folder: Path) -> None:
    """Raise :class:`DataError` unless all arrays are those that the manifest was written for."""
    try:
        found = fingerprint(folder)
    except OSError as error:
        raise DataError(f"The prepared data in {folder} cannot be read: {error}", hint="Prepare it again.") from error
    if found != read_manifest(folder)["fingerprint"]:
        raise DataError(
            f"The prepared data in {folder} is damaged: its fingerprint is another than its manifest's.",
            hint="Prepare it again.",
        )
