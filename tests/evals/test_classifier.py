"""What a classifier scores is what its labels say, with chance beside it; what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gale.core.errors import DataError
from gale.evals.report import evaluate
from gale.model.classifier import load_classifier
from gale.text.tokenizer import Tokenizer
from gale.train.calibration import expected_calibration_error
from tests.evals.folder import choice_rows, figures, recipe, save_tiny, task
from tests.tiny_classifier import save_tiny_classifier
from tests.tiny_model import make_model


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tokenizer, tmp_path_factory.mktemp("classifier"))


def test_one_label_against_none(folder: Path, tmp_path: Path) -> None:
    rows = choice_rows(30)
    settings = {"kind": "classify", "by": "classifier", "prompt": "{question}"}
    asked = task(tmp_path, rows, name="wet", labels={"0": "none", "1": "wet"}, **settings)
    found = figures(evaluate(folder, recipe(asked)))
    classifier = load_classifier(folder, dtype=torch.float32)
    chance = np.array([each["wet"] for each in classifier.probabilities([row["question"] for row in rows])])
    right = np.array([row["label"] == 1 for row in rows])
    # The report may compute in bf16, where one in thirty may fall on the other side of the threshold.
    given = chance >= classifier.calibrations["wet"].threshold
    assert found["wet", "acc"] == pytest.approx(float((given == right).mean()), abs=2 / 30)
    assert found["wet", "ece"] == pytest.approx(expected_calibration_error(chance, right), abs=0.05)


def test_several_values_may_mean_the_same_label_and_the_likeliest_of_several_is_given(
    folder: Path, tmp_path: Path
) -> None:
    settings = {"kind": "classify", "by": "classifier", "prompt": "{question}", "label": "answer"}
    merged = task(tmp_path, choice_rows(), name="merged", labels={"0": "none", "1": "wet", "2": "none"}, **settings)
    both = task(tmp_path, choice_rows(), name="both", labels={"0": "wet", "1": "high", "2": "none"}, **settings)
    report = evaluate(folder, recipe(merged, both))
    found = figures(report)
    assert {metric for name, metric in found if name == "merged"} == {"acc", "macro_f1", "ece"}
    assert {metric for name, metric in found if name == "both"} == {"acc", "macro_f1"}
    assert {sample["given"] for sample in report["tasks"]["both"]["samples"]} <= {"wet", "high", "none"}


def test_a_classifier_does_nothing_else_and_nobody_else_does_its_tasks(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    settings = {"kind": "classify", "prompt": "{question}"}
    by_likelihood = task(tmp_path, choice_rows(), name="guess", labels={"0": "no", "1": "yes"}, **settings)
    by_it = {**by_likelihood, "by": "classifier", "name": "tell", "labels": {"0": "dry", "1": "wet"}}
    with pytest.raises(DataError, match="which cannot do guess"):
        evaluate(folder, recipe(by_likelihood))
    chat = save_tiny(tmp_path / "chat", make_model(tokenizer), tokenizer)
    with pytest.raises(DataError, match="The task tell is for a classifier"):
        evaluate(chat, recipe(by_it))
    with pytest.raises(DataError, match="asks for the labels rough, dry"):
        evaluate(folder, recipe({**by_it, "labels": {"0": "rough", "1": "dry"}}))


def test_a_recipe_that_a_classifier_cannot_follow_is_refused(tmp_path: Path) -> None:
    settings = {"kind": "classify", "by": "classifier", "prompt": "{question}", "name": "t"}
    with pytest.raises(ValueError, match="leave out shots and chat"):
        recipe(task(tmp_path, choice_rows(), labels={"0": "a", "1": "b"}, chat=True, **settings))
    with pytest.raises(ValueError, match="all of them have the same text"):
        recipe(task(tmp_path, choice_rows(), labels={"0": "a", "1": "a"}, **settings))
