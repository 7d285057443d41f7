"""Principles become preferences: valid rows with their origin, the same twice, others under other principles."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gale.core.errors import DataError, RecipeError
from gale.core.recipe import load_recipe
from gale.data.constitution import _Judge, constitutional_feedback, read_prompts
from gale.data.prepare import prepare
from gale.data.principles import Constitution
from gale.data.recipe import DataRecipe
from gale.data.shards import read_manifest
from gale.engine.local import LocalEngine
from gale.model.checkpoint import save_model
from gale.model.transformer import Decoder
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer
from tests.tiny_data import write_jsonl

SHIPPED = Path(__file__).parents[2] / "recipes" / "constitution.toml"
PROMPTS = ("The sea?", "The door.", "The wind!", "风呢", "Hill", "river")
QUESTIONS = {
    "critique": "{prompt} {answer} Judge: {principle}",
    "revision": "{prompt} {answer} {critique} Mend: {principle}",
    "comparison": "{prompt} A: {a} B: {b} {principle} A or B?",
}


def constitution(*texts: str, **changes: Any) -> Constitution:
    principles = [{"name": f"p{index}", "text": text} for index, text in enumerate(texts or ("Be kind.", "Be brief."))]
    fields = {"max_tokens": 4, "prompts": {"en": QUESTIONS}, "principles": principles}
    return Constitution.model_validate(fields | changes)


@pytest.fixture
def folder(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The tiny model as a folder."""
    save_model(model, tmp_path / "tiny", dtype=torch.float32)
    tokenizer.save(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def feedback(folder: Path, tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], dict[str, int]]]:
    """Run over five prompts, or ``prompts``; returns rows and counts."""

    def run(
        wanted: Constitution, name: str = "pairs", *, prompts: int = 5, seed: int = 0
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(PROMPTS[:prompts]), encoding="utf-8")
        out = tmp_path / f"{name}.jsonl"
        counts = constitutional_feedback(wanted, folder, path, out, seed=seed)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], counts

    return run


def test_revisions_become_rows_that_data_preparation_reads(feedback: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows, counts = feedback(constitution())
    assert counts["prompts"] == 5
    assert counts["pairs"] + counts.get("equal", 0) == 5 * 2
    assert len(rows) == counts["pairs"] >= 5
    for row in rows:
        assert row["prompt"][0]["content"] in PROMPTS
        assert row["chosen"] != row["rejected"]
        assert (row["source"], row["model"], row["method"]) == ("constitution", "tiny", "revise")
        assert row["principle"] in ("p0", "p1")
        assert isinstance(row["critique"], str)
    tokenizer.save(tmp_path / "tokenizer")
    source = {"path": str(tmp_path / "pairs.jsonl"), "licence": "CC0", "origin": "us", "format": "preference"}
    recipe = {"tokenizer": str(tmp_path / "tokenizer"), "sources": [source]}
    prepare(DataRecipe.model_validate(recipe), tmp_path / "data")
    assert read_manifest(tmp_path / "data")["splits"]["train"]["documents"] >= 2 * 5


def test_the_same_twice_and_others_with_another_seed_or_other_principles(feedback: Any) -> None:
    rows, _ = feedback(constitution())
    assert feedback(constitution(), "again")[0] == rows
    assert feedback(constitution(), "seed", seed=1)[0] != rows
    changed, _ = feedback(constitution("Be kind.", "Speak of the sea."), "changed")
    kept = [[row for row in some if row["principle"] == "p0"] for some in (rows, changed)]
    assert kept[0] == kept[1]
    assert changed != rows


def test_a_killed_run_goes_on_where_it_was(feedback: Any, tmp_path: Path) -> None:
    rows, _ = feedback(constitution())
    out, beside = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.progress"
    lines = beside.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 5
    beside.write_text("".join(lines[:3]) + lines[3][:10])  # killed within a line: two prompts are done
    out.write_bytes(out.read_bytes()[: json.loads(lines[3])["end"] - 7])
    again, counts = feedback(constitution())
    assert again == rows
    assert (counts["done_before"], counts["prompts"]) == (2, 3)
    more, counts = feedback(constitution(), prompts=6)
    assert more[: len(rows)] == rows
    assert (counts["done_before"], counts["prompts"]) == (5, 1)
    out.write_bytes(out.read_bytes()[:-5])  # a power cut took the end of the rows, but not the note of it
    assert feedback(constitution(), prompts=6)[0] == more


def test_rows_of_different_principles_are_not_mixed(feedback: Any, tmp_path: Path) -> None:
    feedback(constitution(), prompts=1)
    with pytest.raises(DataError, match="begun with other principles"):
        feedback(constitution("Be loud."), prompts=1)
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(DataError, match="exists already"):
        feedback(constitution(), "mine")
    assert (tmp_path / "mine.jsonl").read_text() == "precious"


def test_comparisons_prefer_what_the_model_calls_better_in_both_orders(
    feedback: Any, folder: Path, tokenizer: Tokenizer
) -> None:
    wanted = constitution(method="compare", answers=4)
    rows, counts = feedback(wanted, prompts=2)
    assert counts["pairs"] + counts.get("equal", 0) + counts.get("narrow", 0) == 2 * 2 * 2
    assert all(0.5 < row["probability"] <= 1 for row in rows)
    assert feedback(constitution(method="compare", answers=4, least_lead=0.999), "wide", prompts=2)[1]["narrow"] > 0

    async def both() -> list[Any]:
        engine = LocalEngine.load(folder)
        judge = _Judge(engine, tokenizer, wanted, 0)
        question = [Message(role="user", content=PROMPTS[0])]
        try:
            return [
                await judge._compared(question, pair, wanted.principles[0], Counter())
                for pair in (("Yes, it is.", "no no"), ("no no", "Yes, it is."))
            ]
        finally:
            await engine.close()

    one, other = asyncio.run(both())
    assert one["chosen"] == other["chosen"]
    assert one["probability"] == pytest.approx(other["probability"], rel=1e-3)


def test_what_is_too_long_for_the_model_is_counted_and_left_out(feedback: Any) -> None:
    _, counts = feedback(constitution("Be kind. " * 200, "Be brief."), prompts=2)
    assert counts["too_long"] == 2
    assert counts["prompts"] == 2


def test_the_shipped_principles_are_in_two_languages() -> None:
    shipped = load_recipe(SHIPPED, Constitution)
    assert len(shipped.principles) >= 8
    assert {principle.language for principle in shipped.principles} == {"en", "zh"}
    load_recipe(SHIPPED, Constitution, ["method=compare", "answers=2"])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ('prompts.en.critique="{prompt} {answer}"', "must hold {principle}"),
        ('prompts.en.comparison="{prompt} {principle} {a} {b} {c}"', "must hold no braces but"),
        ("method=compare", "needs at least 2 answers"),
        ("answers=3 method=compare", "of 3 one would be left over"),
        ('principles=[{name="a", text="x"}, {name="a", text="y"}]', "two principles are called 'a'"),
        ('principles=[{name="a", text="x", language="fr"}]', "no prompts in the language 'fr'"),
    ],
)
def test_a_file_of_principles_that_cannot_work_says_why(override: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(SHIPPED, Constitution, override.split(" ") if override.startswith("answers=") else [override])


def test_prompts_are_text_or_conversations_each_once(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}, {"prompt": talk}, {"prompt": "One"}])
    assert read_prompts(path) == [[{"role": "user", "content": "One"}], talk]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "One\u2028two"}])
    assert read_prompts(path) == [[{"role": "user", "content": "One\u2028two"}]]
    (tmp_path / "half.jsonl").write_text('{"prompt": "One"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"line 2: not a prompt: .*surrogates"):
        read_prompts(tmp_path / "half.jsonl")
    for row, reason in (({"text": "a"}, "'prompt' is missing"), ({"prompt": talk[:2]}, "not the user's")):
        with pytest.raises(DataError, match=f"line 2: not a prompt: .*{reason}"):
            read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}, row]))
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")
