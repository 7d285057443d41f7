"""``gale train tokenizer``: trained on the training sources only, measured on the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gale.core.errors import DataError
from gale.data.clean import sample_texts
from gale.data.recipe import Source, TokenizerRecipe
from gale.data.tokenizer_training import train_tokenizer
from gale.text.tokenizer import CONTROL_TOKENS, Tokenizer
from tests.tiny_data import SENTENCES, write_jsonl


def recipe(tmp_path: Path, **fields: Any) -> TokenizerRecipe:
    about = {"licence": "CC0", "origin": "us"}
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in SENTENCES * 2])
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": SENTENCES[2]}])
    sources = [{**about, "path": str(train)}, {**about, "path": str(held), "split": "chinese"}]
    return TokenizerRecipe.model_validate({"vocabulary_size": 330, "sources": sources, **fields})


def test_bytes_per_token_are_reported_for_each_held_out_split(tmp_path: Path) -> None:
    report = train_tokenizer(recipe(tmp_path), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert report["vocabulary_size"] == tokenizer.vocabulary_size == 330
    expected = len(SENTENCES[2].encode()) / len(tokenizer.encode(SENTENCES[2]))
    assert report["bytes_per_token"] == {"chinese": round(expected, 3)}
    assert all(tokenizer.token_id(token) is not None for token in CONTROL_TOKENS)


def test_a_source_gives_no_more_than_its_budget(tmp_path: Path) -> None:
    texts = ["aaaa bbbb " * 30] * 5 + ["zzzz yyyy " * 100]
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    sources = [{"path": str(path), "licence": "CC0", "origin": "us"}]
    train_tokenizer(recipe(tmp_path, sources=sources, max_bytes_per_source=5 * 299), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode("aaaa")) == 1
    assert len(tokenizer.encode("zzzz")) == 4


def test_the_document_that_exceeds_the_budget_is_cut_between_two_characters(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "大风" * 2}, {"role": "assistant", "content": "风" * 9}]}]
    path = write_jsonl(tmp_path / "chats.jsonl", chats * 3)
    source = Source.model_validate({"path": str(path), "licence": "CC0", "origin": "us", "format": "chat"})
    for budget, expected in ((7, [["大风"]]), (13, [["大风大风"]]), (20, [["大风大风", "风风"]])):
        assert list(sample_texts(source, budget=budget, replace={}, seed=0)) == expected
    assert len(list(sample_texts(source, budget=1000, replace={}, seed=0))) == 3


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "empty.jsonl", [{"text": " "}])
    sources = [{"path": str(path), "licence": "CC0", "origin": "us"}]
    with pytest.raises(DataError, match=r"empty\.jsonl holds no text"):
        train_tokenizer(recipe(tmp_path, sources=sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_training_text_is_refused(tmp_path: Path) -> None:
    held = {"path": str(tmp_path / "held.jsonl"), "licence": "CC0", "origin": "us", "split": "held"}
    with pytest.raises(DataError, match="split = 'train'"):
        train_tokenizer(recipe(tmp_path, sources=[held]), tmp_path / "out")
