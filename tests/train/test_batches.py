"""Packing: every token once an epoch, nothing across documents, and each row a pure function of its number."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gale.core import files
from gale.core.errors import DataError
from gale.data.shards import MANIFEST, ShardWriter, TokenSplit
from gale.train.batches import IGNORED, PackedRows

ROW = 16


def split_of(folder: Path, lengths: list[int], shard_tokens: int = 50) -> TokenSplit:
    """A split of documents whose tokens are all different; every third token is marked as trained."""
    writer = ShardWriter(folder, "train", vocabulary_size=2**20, shard_tokens=shard_tokens)
    first = 0
    for length in lengths:
        ids = list(range(first, first + length))
        writer.add(ids, [token % 3 == 0 for token in ids])
        first += length
    writer.close()
    facts = {"documents": len(lengths), "tokens": first, "bytes": 0, "shards": writer.shards}
    files.write_json(folder / MANIFEST, {"fingerprint": "", "vocabulary_size": 2**20, "splits": {"train": facts}})
    return TokenSplit(folder, "train")


def rows_of(
    split: TokenSplit, *, seed: int = 1, long: Literal["split", "cut"] = "split", trained: bool = False
) -> PackedRows:
    return PackedRows(split, row_tokens=ROW, seed=seed, loss_on="trained" if trained else "all", long=long)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=80).filter(lambda sizes: max(sizes) > 1))
def test_an_epoch_predicts_every_token_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    rows = rows_of(split_of(tmp_path_factory.mktemp("split"), lengths))
    batch = rows.batch(0, rows.rows_of_epoch(0))
    targets = Counter(batch.targets_N[batch.targets_N != IGNORED].tolist())
    starts = set((np.cumsum(lengths) - lengths).tolist())  # nothing comes before a document's first token
    assert targets == Counter(token for token in range(sum(lengths)) if token not in starts)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80))
def test_pieces_never_cross_documents_and_count_their_positions(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    rows = rows_of(split_of(tmp_path_factory.mktemp("split"), lengths))
    document = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(rows.rows_of_epoch(0)):
        batch = rows.batch(row, 1)
        assert sum(batch.lengths) == ROW == len(batch.ids_N)
        low = 0
        for length in batch.lengths:
            piece = slice(low, low + length)
            assert batch.positions_N[piece].tolist() == list(range(length))
            targets = batch.targets_N[piece].numpy()
            if (targets != IGNORED).all():
                ids = batch.ids_N[piece].numpy()
                assert (targets == ids + 1).all()  # the tokens of these documents count upwards
                assert len(set(document[ids]) | set(document[targets])) == 1
            low += length


def test_conversations_are_cut_not_split(tmp_path: Path) -> None:
    rows = rows_of(split_of(tmp_path, [50, 5]), long="cut")
    batch = rows.batch(0, rows.rows_of_epoch(0))
    assert sorted(batch.targets_N[batch.targets_N != IGNORED].tolist()) == [*range(1, 17), *range(51, 55)]


def test_only_marked_tokens_are_trained(tmp_path: Path) -> None:
    rows = rows_of(split_of(tmp_path, [10, 20, 30]), trained=True)
    batch = rows.batch(0, rows.rows_of_epoch(0))
    targets = batch.targets_N[batch.targets_N != IGNORED]
    assert sorted(targets.tolist()) == [token for token in range(60) if token % 3 == 0 and token not in (0, 30)]
    assert batch.trained_tokens == len(targets)


def test_a_row_depends_on_its_number_only(tmp_path: Path) -> None:
    split = split_of(tmp_path, [7, 30, 12, 3, 25, 18] * 5)
    rows = rows_of(split)
    count = 3 * rows.rows_of_epoch(0) + 2
    forwards = [rows.batch(row, 1).ids_N.tolist() for row in range(count)]
    fresh = rows_of(split)
    assert [fresh.batch(row, 1).ids_N.tolist() for row in reversed(range(count))] == forwards[::-1]
    assert fresh.batch(3, 4).ids_N.tolist() == functools.reduce(operator.iadd, forwards[3:7], [])


def test_epochs_and_seeds_differ_in_order(tmp_path: Path) -> None:
    split = split_of(tmp_path, [9] * 40)
    rows, other = rows_of(split), rows_of(split, seed=2)
    assert rows.rows_of_epoch(0) == rows.rows_of_epoch(1) == 20
    first, second = (rows.batch(epoch * 20, 20).ids_N.tolist() for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert other.batch(0, 20).ids_N.tolist() != first


def test_little_room_is_wasted(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(2, 40, 500).tolist()
    rows = rows_of(split_of(tmp_path, sizes, shard_tokens=10**6))
    assert sum(size - 1 for size in sizes) / (rows.rows_of_epoch(0) * ROW) > 0.93


def test_conversations_whose_answers_are_all_cut_off_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", vocabulary_size=100, shard_tokens=50)
    for length in (ROW + 2, ROW + 9):
        writer.add(range(length), [token > ROW for token in range(length)])
    writer.close()
    facts = {"documents": 2, "tokens": 2 * ROW + 11, "bytes": 0, "shards": writer.shards}
    files.write_json(tmp_path / MANIFEST, {"fingerprint": "", "vocabulary_size": 100, "splits": {"train": facts}})
    split = TokenSplit(tmp_path, "train")
    with pytest.raises(DataError, match="token to train on among its first 16"):
        rows_of(split, long="cut", trained=True)
    rows_of(split, trained=True)
    rows_of(split, long="cut")


@pytest.mark.parametrize("lengths", [[1, 0, 1], []])
def test_a_split_without_text_is_refused(tmp_path: Path, lengths: list[int]) -> None:
    with pytest.raises(DataError, match="no document of two tokens"):
        rows_of(split_of(tmp_path, lengths))
