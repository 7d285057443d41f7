"""How often documents are taken: epochs given outright, or resolved from the sources' weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gale.data.recipe import Source
from gale.data.shards import ShardWriter, load_shard

# Token ids, and whether the model is trained to produce each.
Encoded = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document's tokens, a number in [0, 1) drawn from its content, and its text's size in bytes.

    A preference has two parts, its two conversations; they stay side by side.
    """

    parts: tuple[Encoded, ...]
    chance: float
    size: int


def copies(chance: float, epochs: float) -> int:
    """How often a document is taken: floor(epochs) times, and once more where ``chance`` is below what remains.

    ``chance`` in [0, 1) comes from the document's content, so that the choice is the same in every run.
    """
    return math.floor(epochs) + (chance < epochs - math.floor(epochs))


def resolve_epochs(sources: Sequence[Source], tokens: Sequence[int]) -> list[float]:
    """Epochs of each weighted source, given the tokens that one epoch of it has after cleaning.

    The mixture is the largest that has exactly the shares asked for and repeats no source more than its
    ``max_epochs``. A source that nothing is left of has no say and no share.
    """
    weights = [source.weight or 0.0 for source in sources]
    total = min(
        (
            source.max_epochs * count / weight
            for source, count, weight in zip(sources, tokens, weights, strict=True)
            if count
        ),
        default=0.0,
    )  # tokens per unit of weight
    return [total * weight / count if count else 0.0 for count, weight in zip(tokens, weights, strict=True)]


class Spool:
    """The encoded documents of one weighted source, on disk until the weights are resolved."""

    def __init__(self, folder: Path, name: str, *, vocabulary_size: int, shard_tokens: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._writer = ShardWriter(folder, name, vocabulary_size=vocabulary_size, shard_tokens=shard_tokens)
        self._chances: list[float] = []
        self._sizes: list[int] = []

    @property
    def tokens(self) -> int:
        """Tokens of all documents, each taken once."""
        return self._writer.tokens

    def add(self, document: EncodedDocument) -> None:
        """Append a document of one part."""
        [(ids, trained)] = document.parts
        self._writer.add(ids, trained)
        self._chances.append(document.chance)
        self._sizes.append(document.size)

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()

    def documents(self) -> Iterator[EncodedDocument]:
        """All documents in the order they were added."""
        others = zip(self._chances, self._sizes, strict=True)
        for name in self._writer.shards:
            shard = load_shard(self._folder, name)
            for low, high in itertools.pairwise(shard.bounds.tolist()):
                yield EncodedDocument(((shard.tokens[low:high], shard.trained[low:high]),), *next(others))
