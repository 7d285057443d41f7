"""Tiny classifiers, trained or drawn."""

from __future__ import annotations

from pathlib import Path

import torch

from gale.model.classifier import Calibration, Classifier, save_classifier
from gale.model.reward_model import RewardModel
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import make_model

LABELS = ("wet", "high")


def make_classifier(tokenizer: Tokenizer, *, window: int = 40) -> Classifier:
    """A classifier with random weights, in fp32."""
    model = RewardModel.from_decoder(make_model(tokenizer), len(LABELS))
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight)
    calibrations = {"wet": Calibration(0.2, 0.5, 0.6), "high": Calibration(0.1, -1.0, 0.25)}
    return Classifier(model.eval(), tokenizer, calibrations, window=window)


def save_tiny_classifier(tokenizer: Tokenizer, folder: Path) -> Path:
    """The same as a folder."""
    save_classifier(make_classifier(tokenizer), folder, dtype=torch.float32)
    return folder
