"""``gale train tokenizer``: trained on the training sources only, measured on the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gale.core.errors import DataError
from gale.data.recipe import TokenizerRecipe
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
    train_tokenizer(recipe(tmp_path, sources=sources, max_bytes_per_source=1600), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode("aaaa")) == 1
    assert len(tokenizer.encode("zzzz")) == 4


def test_a_recipe_without_training_text_is_refused(tmp_path: Path) -> None:
    held = {"path": str(tmp_path / "held.jsonl"), "licence": "CC0", "origin": "us", "split": "held"}
    with pytest.raises(DataError, match="split = 'train'"):
        train_tokenizer(recipe(tmp_path, sources=[held]), tmp_path / "out")
