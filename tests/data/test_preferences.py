"""Preferences lie as pairs side by side: the same prompt twice, and only the two answers are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gale.core.errors import DataError
from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.data.shards import TokenSplit, read_manifest
from gale.text.tokenizer import END_OF_TURN, Tokenizer
from gale.train.next_token import next_token
from tests.tiny_data import SENTENCES, write_jsonl
from tests.train.runs import recipe as stage_recipe

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": SENTENCES[0]},
    {"role": "assistant", "content": SENTENCES[1]},
    {"role": "user", "content": SENTENCES[2]},
]
ROWS: list[dict[str, Any]] = [
    {"prompt": TALK, "chosen": SENTENCES[3], "rejected": SENTENCES[4]},
    {"prompt": SENTENCES[5], "chosen": "Yes.", "rejected": "No."},
]


@pytest.fixture
def prepare_rows(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """A function that prepares rows as preferences, with fields of the source changed, and returns their folder."""
    tokenizer.save(tmp_path / "tokenizer")

    def run(rows: list[dict[str, Any]], **fields: Any) -> Path:
        path = write_jsonl(tmp_path / "pairs.jsonl", rows)
        source = {"path": str(path), "licence": "CC0", "origin": "test", "format": "preference", **fields}
        recipe = {"tokenizer": str(tmp_path / "tokenizer"), "shard_tokens": 1024, "sources": [source]}
        prepare(DataRecipe.model_validate(recipe), tmp_path / "out")
        return tmp_path / "out"

    return run


def test_both_documents_of_a_pair_share_the_prompt_and_train_the_last_answer_only(
    prepare_rows: Any, tokenizer: Tokenizer
) -> None:
    folder = prepare_rows(ROWS)
    assert read_manifest(folder)["splits"]["train"]["pairs"] is True
    split = TokenSplit(folder, "train")
    assert split.pairs
    assert len(split) == 4
    end = tokenizer.token_id(END_OF_TURN)
    for pair, row in enumerate(ROWS):
        halves = [split.document(2 * pair + half) for half in (0, 1)]
        prompts = [ids[: int(np.argmax(trained))].tolist() for ids, trained in halves]
        assert prompts[0] == prompts[1]
        for (ids, trained), answer in zip(halves, (row["chosen"], row["rejected"]), strict=True):
            assert tokenizer.decode(ids[trained].tolist()) == answer
            assert ids[trained][-1] == end  # a model must learn to stop
            assert not trained[: int(np.argmax(trained))].any()


def test_a_pair_is_repeated_and_dropped_as_one(prepare_rows: Any) -> None:
    folder = prepare_rows([*ROWS, ROWS[0]], epochs=2)
    [source] = read_manifest(folder)["sources"]
    assert (source["read"], source["duplicates"], source["documents"]) == (3, 1, 8)
    split = TokenSplit(folder, "train")
    first, again = ([split.document(index)[0].tolist() for index in pair] for pair in ((0, 1), (2, 3)))
    assert first == again
    assert "number 3 kept of pairs.jsonl" in split.name_of(3)
    # Another rejected answer makes another preference.
    folder = prepare_rows([ROWS[1], {**ROWS[1], "rejected": "Never."}])
    assert len(TokenSplit(folder, "train")) == 4


def test_answers_that_are_empty_or_the_same_make_no_preference(prepare_rows: Any) -> None:
    folder = prepare_rows([*ROWS, {**ROWS[1], "rejected": " Yes. "}, {**ROWS[1], "chosen": ""}])
    assert read_manifest(folder)["sources"][0]["empty"] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": None}, "'chosen' is not text"),
        ({"prompt": [{"role": "judge", "content": ""}]}, "unknown role"),
        ({"prompt": 3}, "not iterable"),
    ],
)
def test_a_row_that_is_no_preference_is_named(prepare_rows: Any, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"line 2: not a row of the format 'preference'.*{reason}"):
        prepare_rows([ROWS[0], {**ROWS[1], **changes}])


def test_pairs_and_single_documents_do_not_share_a_split(tmp_path: Path) -> None:
    source = {"path": "a.jsonl", "licence": "CC0", "origin": "test"}
    sources = [{**source, "format": "preference"}, {**source, "format": "chat"}]
    with pytest.raises(ValueError, match="'train' mixes sources of the format preference"):
        DataRecipe.model_validate({"tokenizer": str(tmp_path), "sources": sources})


def test_worse_answers_are_not_learnt_by_rote(prepare_rows: Any) -> None:
    folder = prepare_rows(ROWS)
    with pytest.raises(DataError, match="holds preferences") as caught:
        next_token(stage_recipe(folder), folder, loss_on="trained", long="cut")
    assert "gale train dpo" in str(caught.value.hint)
