"""Pairs: every one once an epoch, both halves side by side, and each row a pure function of its number."""

from __future__ import annotations

from pathlib import Path

import pytest

from gale.core.errors import DataError
from gale.data.shards import TokenSplit
from gale.text.tokenizer import END_OF_TURN, Tokenizer
from gale.train.batches import IGNORED, Batch
from gale.train.pairs import PairedRows
from tests.train.preferences import ROWS, prepare_pairs


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_pairs(tokenizer, tmp_path_factory.mktemp("pairs"), ROWS[:5], ROWS[5:])


def rows_of(data: Path, *, row_tokens: int = 200, seed: int = 1) -> PairedRows:
    return PairedRows(TokenSplit(data, "train"), row_tokens=row_tokens, seed=seed)


def halves(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of each piece."""
    return [
        (ids.tolist(), targets.tolist())
        for ids, targets in zip(batch.ids_N.split(batch.lengths), batch.targets_N.split(batch.lengths), strict=True)
    ]


def test_an_epoch_holds_every_pair_once_and_the_next_in_another_order(data: Path) -> None:
    rows = rows_of(data)
    orders = [[rows.place(row) for row in range(epoch * 5, epoch * 5 + 5)] for epoch in range(4)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [rows_of(data, seed=2).place(row) for row in range(20)] != [place for order in orders for place in order]


def test_a_row_depends_on_its_number_only(data: Path) -> None:
    rows, fresh = rows_of(data), rows_of(data)
    forwards = [rows.batch(row, 1).ids_N.tolist() for row in range(12)]
    assert [fresh.batch(row, 1).ids_N.tolist() for row in reversed(range(12))] == forwards[::-1]
    assert fresh.batch(3, 4).ids_N.tolist() == [token for row in forwards[3:7] for token in row]


def test_what_is_trained_is_the_answer_with_the_token_that_ends_it(data: Path, tokenizer: Tokenizer) -> None:
    rows, end = rows_of(data), tokenizer.token_id(END_OF_TURN)
    answers = {row["prompt"]: (row["chosen"], row["rejected"]) for row in ROWS}
    for row in range(len(rows)):
        batch = rows.batch(row, 1)
        assert batch.positions_N.tolist() == [place for length in batch.lengths for place in range(length)]
        prompts = []
        for half, (ids, targets) in enumerate(halves(batch)):
            trained = [target for target in targets if target != IGNORED]
            assert trained == ids[len(ids) - len(trained) :]
            assert trained[-1] == end
            prompt = tokenizer.decode(ids[: -len(trained)])
            assert tokenizer.decode(trained) == answers[prompt][half]
            prompts.append(ids[: -len(trained)])
        assert prompts[0] == prompts[1]


def test_a_long_prompt_loses_its_beginning_in_both_halves(data: Path) -> None:
    whole, cut = rows_of(data), rows_of(data, row_tokens=90)
    assert cut.cut
    assert not whole.cut + whole.dropped
    for row in range(len(cut)):
        (chosen, _), (rejected, _) = halves(cut.batch(row, 1))
        assert max(len(chosen), len(rejected)) <= 90
        originals = {tuple(half) for other in range(len(whole)) for half, _ in halves(whole.batch(other, 1))}
        assert all(any(original[-len(half) :] == tuple(half) for original in originals) for half in (chosen, rejected))


def test_pairs_that_do_not_fit_are_counted_and_left_out(data: Path) -> None:
    rows = rows_of(data, row_tokens=80)
    assert (len(rows), rows.dropped) == (2, 3)
    assert 0 <= min(rows.place(row) for row in range(10)) <= max(rows.place(row) for row in range(10)) < len(rows)
    with pytest.raises(DataError, match="No pair of the split 'train' fits into 16 tokens"):
        rows_of(data, row_tokens=16)


def test_single_documents_are_no_pairs(prepared: Path) -> None:
    with pytest.raises(DataError, match="holds no preferences") as caught:
        PairedRows(TokenSplit(prepared, "train"), row_tokens=100, seed=0)
    assert "preference" in str(caught.value.hint)


def test_a_row_names_its_documents(data: Path) -> None:
    assert "train.jsonl" in rows_of(data).describe(3, 2)
