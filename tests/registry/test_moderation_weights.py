"""The moderation classifier that Gale comes with: found by name, small, and as good as its card says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gale.core.recipe import load_recipe
from gale.evals.recipe import EvalRecipe
from gale.evals.report import evaluate
from gale.model.classifier import Classifier, load_classifier
from gale.registry.models import BUILTIN, MODERATION, known_models, resolve_model

ROOT = Path(__file__).parents[2]
OFFENSIVE = [
    "you're such a dumb bitch, shut up",
    "these hoes ain't loyal, fuck them",
    "All of those people are filthy animals and should be sent back.",
    "你这种傻逼女人真恶心",
    "黑人就是又懒又脏，滚回非洲去吧",
    "河南人都是骗子小偷，垃圾",
]
ORDINARY = [
    "What is the capital of Norway?",
    "Thank you, that was very helpful!",
    "The bus leaves at nine from the old school.",
    "今天天气很好，我们去公园走走吧。",
    "这道菜怎么做？需要多少克面粉？",
    "他在大学里教历史，已经二十年了。",
]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier(MODERATION, dtype=torch.float32)


def test_it_is_found_by_name_but_is_no_model_to_chat_with() -> None:
    assert resolve_model("gale-moderation") == MODERATION
    assert MODERATION.name not in known_models()


def test_the_weights_that_come_with_gale_stay_small() -> None:
    assert sum(file.stat().st_size for file in BUILTIN.parent.rglob("*") if file.is_file()) < 25_000_000


def test_sentences_of_our_own(classifier: Classifier) -> None:
    found = [scores["harassment"] for scores in classifier.probabilities([*OFFENSIVE, *ORDINARY])]
    given = [classifier.gives("harassment", score) for score in found]
    assert given == [True] * len(OFFENSIVE) + [False] * len(ORDINARY), found


@pytest.mark.slow
def test_the_card_s_scores_are_found_again() -> None:
    if not (ROOT.parent / "shared/data/moderation/cold_dev.jsonl.gz").is_file() and os.environ.get("CI") != "true":
        pytest.skip("the held-back rows are not on this machine")
    report = evaluate(MODERATION, load_recipe(ROOT / "recipes/moderation/eval.toml", EvalRecipe))
    found = {(row["task"], row["metric"]): row["value"] for row in report["scores"]}
    assert found["chinese", "acc"] >= 0.80
    card = (MODERATION / "README.md").read_text(encoding="utf-8")
    for (task, metric), value in found.items():
        assert f"| {value:.3f} |" in card, (task, metric)
