"""A classifier's folder says what it said before, to transformers too, and a long text is judged whole."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from gale.core.errors import ModelError
from gale.model.classifier import Calibration, is_classifier, last_logits, load_classifier
from gale.model.reward_model import load_reward_model
from gale.text.tokenizer import Tokenizer
from tests.tiny_classifier import LABELS, make_classifier, save_tiny_classifier
from tests.tiny_model import save_folder

TEXTS = ["The sea goes nowhere.", "风从山上吹来。", "a", "The wind came over the hill."]


def test_probabilities_are_the_scaled_logits_of_each_text_alone(tokenizer: Tokenizer) -> None:
    classifier = make_classifier(tokenizer)
    for text, found in zip(TEXTS, classifier.probabilities(TEXTS), strict=True):
        [logits] = last_logits(classifier.model, classifier.pieces(text)).tolist()
        for label, logit in zip(LABELS, logits, strict=True):
            fitted = classifier.calibrations[label]
            wanted = 1 / (1 + math.exp(-(fitted.slope * logit + fitted.intercept)))
            assert found[label] == pytest.approx(wanted, abs=1e-4)
            assert classifier.gives(label, found[label]) == (found[label] >= fitted.threshold)


def test_many_batches_give_what_one_gives(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_classifier(tokenizer)
    pieces = [piece for text in TEXTS for piece in classifier.pieces(text)]
    whole = last_logits(classifier.model, pieces)
    monkeypatch.setattr("gale.model.classifier._BATCH_TOKENS", 7)
    torch.testing.assert_close(last_logits(classifier.model, pieces), whole, rtol=0, atol=1e-4)


def test_of_a_long_text_the_piece_that_scores_highest_counts_and_nothing_scores_nothing(tokenizer: Tokenizer) -> None:
    classifier = make_classifier(tokenizer, window=6)
    text = " ".join(TEXTS)
    pieces = classifier.pieces(text)
    assert list(itertools.chain(*pieces)) == tokenizer.encode(text)
    assert {len(piece) for piece in pieces[:-1]} == {6}
    scores = classifier.piece_probabilities(pieces)
    [found, nothing] = classifier.probabilities([text, ""])
    assert list(found.values()) == pytest.approx(scores.amax(0).tolist(), abs=1e-5)
    assert set(nothing.values()) == {0.0}


def test_what_is_saved_is_loaded_and_transformers_sees_the_same_logits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tiny_classifier(tokenizer, tmp_path)
    before, again = make_classifier(tokenizer), load_classifier(tmp_path, dtype=torch.float32)
    assert is_classifier(tmp_path)
    assert (again.labels, again.calibrations, again.window) == (LABELS, before.calibrations, before.window)
    assert again.probabilities(TEXTS) == before.probabilities(TEXTS)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.problem_type == "multi_label_classification"
    for text in TEXTS:
        with torch.no_grad():
            [logits] = theirs(torch.tensor([tokenizer.encode(text)])).logits
        [ours] = last_logits(again.model, again.pieces(text))
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)


def test_other_folders_and_damage_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        load_classifier(folder, dtype=torch.float32)

    with pytest.raises(ModelError, match="holds no classifier"):
        load(save_folder(tokenizer, tmp_path / "chat"))
    folder = save_tiny_classifier(tokenizer, tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"score.weight of shape \[1, 48\], but holds \[2, 48\]"):
        load_reward_model(folder, dtype=torch.float32)
    content = json.loads((folder / "classifier.json").read_text())

    def written(**changes: object) -> Path:
        (folder / "classifier.json").write_text(json.dumps({**content, **changes}))
        return folder

    for broken in ({"window_tokens": 0}, {"window_tokens": None}, {"labels": {}}, {"labels": []}):
        with pytest.raises(ModelError, match="is damaged"):
            load(written(**broken))
    with pytest.raises(ModelError, match="is damaged"):
        load(written(labels={**content["labels"], "wet": {"slope": 1e999, "intercept": 0, "threshold": 0.5}}))
    with pytest.raises(ModelError, match="more than the model reads"):
        load(written(window_tokens=701))
    with pytest.raises(ModelError, match="names the labels"):
        load(written(labels=dict(reversed(content["labels"].items()))))


def test_a_threshold_is_reached_when_it_is_met(tokenizer: Tokenizer) -> None:
    classifier = make_classifier(tokenizer)
    assert classifier.calibrations["wet"] == Calibration(0.2, 0.5, 0.6)
    assert classifier.gives("wet", 0.6)
    assert not classifier.gives("wet", 0.5999)
