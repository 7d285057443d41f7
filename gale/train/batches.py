"""Batches by number: row g of a run is the same whatever came before, so a resumed run needs no more than a count.

Documents are cut into pieces of at most a row, the pieces are shuffled anew each epoch, and packed into rows of a
fixed number of tokens. Attention never crosses from one piece into another.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gale.core.errors import DataError
from gale.data.shards import TokenSplit

IGNORED = -100  # the target value that cross-entropy skips
_OPEN_ROWS = 32
_SHOWN_DOCUMENTS = 20


@dataclass(frozen=True, slots=True)
class Batch:
    """N flattened tokens with the token to predict after each, their positions, and the pieces they form."""

    ids_N: Tensor
    targets_N: Tensor
    positions_N: Tensor
    lengths: list[int]

    @property
    def trained_tokens(self) -> int:
        """How many of the N predictions count in the loss."""
        return int((self.targets_N != IGNORED).sum())


class Rows(Protocol):
    """What an objective reads: rows by their numbers in the endless sequence of epochs."""

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows ``first_row`` to ``first_row + rows``."""

    def describe(self, first_row: int, rows: int) -> str:
        """Which documents stand in these rows."""

    def rows_of_epoch(self, epoch: int) -> int:
        """Number of rows in one pass over the split."""


class WholeRows:
    """Rows that are a document each, of whatever length, with the loss on the tokens that the shards mark.

    For few and short examples, of which a person wants to say how many make a step. Raises :class:`DataError` for a
    split with nothing to train on.
    """

    def __init__(self, split: TokenSplit, *, seed: int) -> None:
        self._split, self._seed = split, seed
        if not any(split.document(index)[1][1:].any() for index in range(len(split))):
            raise DataError(f"No document of the split {split.name!r} has a token to train on.")

    def batch(self, first_row: int, rows: int) -> Batch:
        """See :meth:`Rows.batch`."""
        ids, targets, lengths = [], [], []
        for row in range(first_row, first_row + rows):
            tokens, trained = self._split.document(self._place(row))
            following = np.append(tokens[1:].astype(np.int64), IGNORED)
            following[:-1][~trained[1:]] = IGNORED
            ids.append(tokens.astype(np.int64))
            targets.append(following)
            lengths.append(len(tokens))
        positions = np.concatenate([np.arange(length) for length in lengths])
        ids_N, targets_N = torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(targets))
        return Batch(ids_N, targets_N, torch.from_numpy(positions), lengths)

    def describe(self, first_row: int, rows: int) -> str:
        """See :meth:`Rows.describe`; documents are numbered from 0, as the lines they were made from are from 1."""
        places = dict.fromkeys(self._place(row) for row in range(first_row, first_row + rows))
        return ", ".join(self._split.name_of(place) for place in places)

    def rows_of_epoch(self, epoch: int) -> int:
        """See :meth:`Rows.rows_of_epoch`."""
        return len(self._split)

    def _place(self, row: int) -> int:
        epoch, index = divmod(row, len(self._split))
        return int(self._order(epoch)[index])

    @lru_cache(maxsize=2)  # noqa: B019 (one object lives as long as the run)
    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._split))


class PackedRows:
    """Rows of ``row_tokens`` predictions from a split.

    ``loss_on`` "all" trains every token; "trained" only those the shards mark (the assistant's). ``long``
    "split" cuts long documents into several pieces (running text); "cut" keeps only the beginning (conversations).
    Raises :class:`DataError` for a split in which there is nothing to predict.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        row_tokens: int,
        seed: int,
        loss_on: Literal["all", "trained"],
        long: Literal["split", "cut"],
    ) -> None:
        self._split, self._row_tokens, self._seed, self._loss_on = split, row_tokens, seed, loss_on
        lengths = split.lengths() - 1  # predictions of a document
        if not (lengths > 0).any():
            raise DataError(f"The split {split.name!r} holds no document of two tokens or more.")
        # A piece is (document, first token, predictions).
        counts = np.where(lengths > 0, -(-lengths // row_tokens) if long == "split" else 1, 0)
        documents = np.repeat(np.arange(len(lengths)), counts)
        starts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * row_tokens
        sizes = np.minimum(lengths[documents] - starts, row_tokens)
        self._pieces = np.stack([documents, starts, sizes], axis=1)
        if loss_on == "trained" and not any(map(self._teaches, self._pieces)):
            raise DataError(
                f"No document of the split {split.name!r} has a token to train on among its first {row_tokens}.",
                hint="Raise row_tokens, or prepare conversations in which the assistant answers.",
            )
        self._first_rows = [0]  # of the epochs met so far: where each begins in the endless sequence

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows ``first_row`` to ``first_row + rows`` of the endless sequence of epochs."""
        ids = np.zeros(rows * self._row_tokens, np.int64)
        targets = np.full(len(ids), IGNORED, np.int64)
        positions = np.zeros(len(ids), np.int64)
        lengths: list[int] = []
        for row in range(rows):
            at, end = row * self._row_tokens, (row + 1) * self._row_tokens
            for document, start, size in self._pieces[self._row(first_row + row)]:
                tokens, trained = self._split.document(int(document))
                ids[at : at + size] = tokens[start : start + size]
                following = tokens[start + 1 : start + size + 1].astype(np.int64)
                if self._loss_on == "trained":
                    following[~trained[start + 1 : start + size + 1]] = IGNORED
                targets[at : at + size] = following
                positions[at : at + size] = np.arange(size)
                lengths.append(int(size))
                at += size
            if at < end:  # what is left of the row is a piece without targets
                lengths.append(end - at)
                positions[at:end] = np.arange(end - at)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions), lengths)

    def describe(self, first_row: int, rows: int) -> str:
        """Which documents stand in these rows, with the source of each where the manifest tells."""
        documents = [
            int(self._pieces[piece][0]) for row in range(first_row, first_row + rows) for piece in self._row(row)
        ]
        shown = [self._split.name_of(document) for document in dict.fromkeys(documents)]
        more = f" and {len(shown) - _SHOWN_DOCUMENTS} more" if len(shown) > _SHOWN_DOCUMENTS else ""
        return f"rows {first_row} to {first_row + rows - 1}: {', '.join(shown[:_SHOWN_DOCUMENTS])}{more}"

    def rows_of_epoch(self, epoch: int) -> int:
        """Number of rows in one pass over the split."""
        return len(self._packing(epoch))

    def _teaches(self, piece: npt.NDArray[np.int64]) -> bool:
        document, start, size = piece
        _, trained = self._split.document(int(document))
        return bool(trained[start + 1 : start + size + 1].any())

    def _row(self, number: int) -> npt.NDArray[np.int64]:
        while number >= self._first_rows[-1]:
            self._first_rows.append(self._first_rows[-1] + self.rows_of_epoch(len(self._first_rows) - 1))
        epoch = bisect.bisect_right(self._first_rows, number) - 1
        return self._packing(epoch)[number - self._first_rows[epoch]]

    @lru_cache(maxsize=2)  # noqa: B019 (one object lives as long as the run)
    def _packing(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Piece numbers of every row of an epoch."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._pieces))
        return list(_pack(order, self._pieces[:, 2], self._row_tokens))


def _pack(
    order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], row_tokens: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Put each piece into the fullest of a few open rows that still has room; measured waste is under 2%."""
    rows: list[list[int]] = []
    room: list[int] = []
    for piece in order:
        size = int(sizes[piece])
        fitting = [index for index, space in enumerate(room) if space >= size]
        if fitting:
            index = min(fitting, key=room.__getitem__)
        else:
            if len(rows) == _OPEN_ROWS:
                fullest = room.index(min(room))
                yield np.array(rows.pop(fullest))
                room.pop(fullest)
            rows.append([])
            room.append(row_tokens)
            index = len(rows) - 1
        rows[index].append(int(piece))
        room[index] -= size
        if room[index] == 0:
            yield np.array(rows.pop(index))
            room.pop(index)
    yield from map(np.array, rows)
