"""A tiny model in a folder, and small task files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gale.evals.recipe import EvalRecipe
from gale.model.checkpoint import save_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_data import write_jsonl

WORDS = ["wind", "hill", "door", "river", "sea", "风", "山", "门"]


def save_tiny(folder: Path, model: Decoder, tokenizer: Tokenizer) -> Path:
    save_model(model, folder, dtype=torch.float32)
    tokenizer.save(folder)
    return folder


def pair_rows(count: int = 24) -> list[dict[str, Any]]:
    """Sentences whose words change places in the bad one."""
    rows = []
    for n in range(count):
        one, two = WORDS[n % 8], WORDS[(3 * n + 1) % 8]
        rows.append(
            {"good": f"The {one} came over the {two} {n}.", "bad": f"The came {one} over {two} the {n}.", "field": one}
        )
    return rows


def choice_rows(count: int = 24) -> list[dict[str, Any]]:
    """Questions with three or four choices of different lengths."""
    rows = []
    for n in range(count):
        choices = [WORDS[n % 8], f"the {WORDS[(n + 1) % 8]} 门", f"{WORDS[(n + 2) % 8]} and {WORDS[n % 8]}", "nowhere"]
        question = f"Where does the {WORDS[(5 * n) % 8]} go, number {n}?"
        choices = choices[: 3 + n % 2]
        rows.append({"question": question, "choices": choices, "answer": n % 3, "label": n % 2, "source": f"s{n % 2}"})
    return rows


def task(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """A task as a recipe has it, over ``rows`` written to a file of its own."""
    path = write_jsonl(folder / f"{settings['name']}.jsonl", rows)
    return {"path": str(path), "licence": "CC0", "origin": "written for this test", **settings}


def recipe(*tasks: dict[str, Any], **settings: Any) -> EvalRecipe:
    return EvalRecipe.model_validate({"tasks": list(tasks), **settings})


def figures(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in json.loads(json.dumps(report))["scores"]}
