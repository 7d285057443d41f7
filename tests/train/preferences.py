"""Tiny preferences and recipes of the stages that train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.model.checkpoint import save_model
from gale.text.tokenizer import Tokenizer
from gale.train.recipe import TuningRecipe
from tests.tiny_data import SENTENCES, write_jsonl
from tests.tiny_model import make_model
from tests.train.runs import recipe as pretrain_recipe

RecipeType = TypeVar("RecipeType", bound=TuningRecipe)
ROWS = [
    {"prompt": SENTENCES[first], "chosen": SENTENCES[second], "rejected": SENTENCES[third]}
    for first, second, third in ((0, 1, 2), (3, 4, 5), (6, 7, 0), (1, 3, 5), (2, 4, 6), (5, 6, 7), (7, 0, 3))
]


def prepare_pairs(tokenizer: Tokenizer, folder: Path, rows: list[dict[str, Any]], held: list[dict[str, Any]]) -> Path:
    """Prepared preferences with a split ``train`` and a held-out split ``held``, in ``folder``/data."""
    tokenizer.save(folder / "tokenizer")
    source = {"licence": "CC0", "origin": "written for this test", "format": "preference"}
    sources = [
        {**source, "path": str(write_jsonl(folder / "train.jsonl", rows))},
        {**source, "path": str(write_jsonl(folder / "held.jsonl", held)), "split": "held"},
    ]
    prepare(DataRecipe.model_validate({"tokenizer": str(folder / "tokenizer"), "sources": sources}), folder / "data")
    return folder / "data"


def save_base(tokenizer: Tokenizer, folder: Path, **changes: Any) -> Path:
    """A tiny model folder in fp32, with its tokenizer."""
    model = make_model(tokenizer, **changes)
    for parameter in model.parameters():  # not so sure of itself that losses leave the range where they are curved
        if parameter.ndim > 1:
            parameter.data /= 4
    save_model(model, folder, dtype=torch.float32)
    tokenizer.save(folder)
    return folder


def recipe(kind: type[RecipeType], data: Path, base: Path, **changes: Any) -> RecipeType:
    """A recipe of 6 steps; ``changes`` replace whole fields."""
    fields = pretrain_recipe(data).model_dump(exclude={"model"}) | {"base": base, "row_tokens": 120, "export": "fp32"}
    return kind.model_validate(fields | changes)
