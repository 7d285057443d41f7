"""Scores are what their names say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gale.core.recipe import load_recipe
from gale.evals.bits_per_byte import bits_per_byte
from gale.evals.page import to_markdown
from gale.evals.reading import Answer, answer_scores, score
from gale.evals.recipe import DEFAULT_RECIPE, EvalRecipe
from gale.evals.report import evaluate
from gale.model.attention import PackedAttention
from gale.model.checkpoint import save_model
from gale.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.tiny_data import write_jsonl
from tests.tiny_model import make_model


def test_an_untrained_uniform_model_scores_its_vocabulary(tokenizer: Tokenizer) -> None:
    uniform = make_model(tokenizer)
    uniform.embed_tokens.weight.data.zero_()
    text = "The wind came over the hill. 风从山上吹来。"
    tokens = len(tokenizer.encode(text))
    expected = tokens * math.log2(tokenizer.vocabulary_size) / len(text.encode())
    assert bits_per_byte(uniform, tokenizer, [text], window=8, title="t").value == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_is_the_summed_surprise_of_every_token(tokenizer: Tokenizer) -> None:
    tiny = make_model(tokenizer)
    text = "Where does the river go? 河流去哪里？"
    ids = [tokenizer.token_id(END_OF_TEXT), *tokenizer.encode(text)]
    with torch.inference_mode():
        hidden = tiny(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1), PackedAttention([len(ids) - 1]))
        logprobs = torch.log_softmax(tiny.logits(hidden), -1)
    surprise = -float(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum()) / math.log(2)
    measured = bits_per_byte(tiny, tokenizer, [text, text], window=500, title="t").value
    assert measured == pytest.approx(surprise / len(text.encode()), rel=1e-5)


def test_reading_scores() -> None:
    no = "The passage does not say."
    scores = score(
        [
            Answer("grounded", "q", "In Leeds.", "in leeds"),
            Answer("grounded", "q", "A red bike.", "A red car."),
            Answer("grounded", "q", "杭州。", no),
            Answer("unanswerable", "q", no, no),
            Answer("unanswerable", "q", no, "Leeds."),
        ]
    )
    assert scores["exact_match"] == pytest.approx(1 / 3, abs=1e-4)
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-4)
    assert scores["refused_wrongly"] == pytest.approx(1 / 3, abs=1e-4)
    assert scores["unanswerable_admitted"] == 0.5
    assert scores["closed_book_admitted"] is None


def test_the_nearest_of_several_right_answers_counts() -> None:
    no, others = "It does not say.", ("A red bike.", "Leeds Station.", "杭州西湖。")
    answers = [
        Answer("grounded", "q", "In Leeds.", "leeds station", others),
        Answer("grounded", "q", "In Leeds.", "The red bike", others),
        Answer("grounded", "q", "杭州。", "西湖", others),
        Answer("grounded", "q", "In Leeds.", no, others),
    ]
    scores = score(answers)
    assert scores["exact_match"] == 1 / 4
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4, abs=1e-4)
    assert {row.metric: row.value for row in answer_scores("squad", answers)} == {
        "exact match": 1 / 4,
        "F1": pytest.approx(scores["f1"], abs=1e-4),
    }
    first = [replace(answer, alternatives=()) for answer in answers]
    assert score(first)["exact_match"] == 0
    assert score(first)["f1"] == pytest.approx(1 / 2 / 4, abs=1e-4)


def test_all_answers_of_a_row_are_held_to(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Read from files to the report; the untrained model answers anything."""
    spans = [{"text": text, "start": 7} for text in ("blue", "Blue.", "blue and wide")]
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"context": "Sea is blue and wide.", "question": "What is it?", "answers": spans},
            {"context": "Sea is blue and wide.", "question": "What is it?", "answers": spans[:1]},
        ],
    )
    templates = {
        **{"prompts": ["{context} {question}"], "unanswerable_reply": "No.", "closed_book_reply": "Where?"},
        **{"grounded": 1.0, "unanswerable": 0.0, "closed_book": 0.0},
    }
    source = {"path": str(path), "licence": "CC0", "origin": "test", "split": "sea"}
    source |= {"format": "qa", "questions": templates}
    save_model(make_model(tokenizer), tmp_path / "model", dtype=torch.float32)
    tokenizer.save(tmp_path / "model")
    report = evaluate(
        tmp_path / "model", EvalRecipe.model_validate({"sources": [source], "prompts": [], "max_answer_tokens": 3})
    )
    assert [sample["expected"] for sample in report["reading"]["sea"]["samples"]] == ["Blue.", "Blue."]
    assert [sample.get("alternatives") for sample in report["reading"]["sea"]["samples"]] == [["Blue and wide."], None]
    assert json.loads(json.dumps(report)) == report
    page = to_markdown(report)
    assert "- exact match: " in page
    assert "- F1: " in page


def test_the_default_evaluation_needs_nothing_but_a_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(make_model(tokenizer), tmp_path, dtype=torch.float32)
    tokenizer.save(tmp_path)
    recipe = load_recipe(DEFAULT_RECIPE, EvalRecipe, ["max_answer_tokens=3"])
    report = evaluate(tmp_path, recipe)
    assert set(report["bits_per_byte"]) == {"english", "chinese"}
    assert [item["prompt"] for item in report["answers"]] == list(recipe.prompts)
    assert json.loads(json.dumps(report)) == report
    assert "- chinese: " in to_markdown(report)
