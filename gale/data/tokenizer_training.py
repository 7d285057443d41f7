"""``gale train tokenizer``: learn a vocabulary from a sample of the sources and report how well it packs each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from gale.core import files
from gale.core.errors import DataError
from gale.core.recipe import load_recipe
from gale.data.cache import is_recipe, made_once
from gale.data.clean import sample_texts
from gale.data.recipe import Source, TokenizerRecipe
from gale.text.template import GALE_CHAT_TEMPLATE
from gale.text.tokenizer import Tokenizer


def train_tokenizer(recipe: TokenizerRecipe, out: Path) -> dict[str, Any]:
    """Train on the ``train`` sources, write the tokenizer to ``out``, and return bytes per token of the others.

    Raises :class:`DataError` for sources that are missing, damaged or without text.
    """
    if not any(source.split == "train" for source in recipe.sources):
        raise DataError("The recipe has no source with split = 'train'.")
    training = [source for source in recipe.sources if source.split == "train"]
    texts = (text for source in training for text in _texts(source, recipe))
    tokenizer = Tokenizer.train(texts, vocabulary_size=recipe.vocabulary_size, chat_template=GALE_CHAT_TEMPLATE)
    size, tokens = Counter[str](), Counter[str]()
    for source in recipe.sources:
        if source.split != "train":
            for text in _texts(source, recipe):
                size[source.split] += len(text.encode())
                tokens[source.split] += len(tokenizer.encode(text))
    report = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "bytes_per_token": {split: round(size[split] / max(1, tokens[split]), 3) for split in sorted(size)},
    }
    with files.new_directory(out, marker="tokenizer.json") as folder:
        tokenizer.save(folder)
        files.write_json(folder / "report.json", {**report, "recipe": recipe.model_dump(mode="json")})
    return report


def ready_tokenizer(path: Path) -> Path:
    """The tokenizer folder that ``path`` is, or that the tokenizer recipe ``path`` makes."""
    if not is_recipe(path):
        return path
    return made_once(load_recipe(path, TokenizerRecipe), train_tokenizer, kind="tokenizer", marker="tokenizer.json")


def _texts(source: Source, recipe: TokenizerRecipe) -> Iterator[str]:
    documents = sample_texts(source, budget=recipe.max_bytes_per_source, replace=recipe.replace, seed=recipe.seed)
    return chain.from_iterable(documents)
