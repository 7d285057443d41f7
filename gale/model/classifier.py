"""A reward model with a number for each of several labels, and what turns these numbers into probabilities.

A folder is in Hugging Face layout (``Qwen3ForSequenceClassification`` of the kind multi_label_classification), so
transformers opens it; its logits are those before calibration. ``classifier.json`` beside it holds what was fitted on
rows of its own: Platt scaling (Platt 1999) and the probability from which on a label is given.

Shape suffixes: N tokens, L labels, P pieces of texts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gale.core import files
from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_tokenizer
from gale.model.reward_model import RewardModel, load_reward_model, save_reward_model
from gale.text.tokenizer import END_OF_TEXT, Tokenizer

CALIBRATION = "classifier.json"
# Tokens that are computed at once; more are slower on a CPU, as they leave its caches.
_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Calibration:
    """The probability of a label is ``sigmoid(slope * logit + intercept)``; it is given from ``threshold`` on."""

    slope: float
    intercept: float
    threshold: float


class Classifier:
    """Which labels a text deserves. A text longer than ``window`` tokens is judged piece by piece: the highest counts.

    Not safe for use by several threads at once.
    """

    def __init__(
        self, model: RewardModel, tokenizer: Tokenizer, calibrations: dict[str, Calibration], *, window: int
    ) -> None:
        self.model, self.tokenizer, self.calibrations, self.window = model, tokenizer, calibrations, window

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the head's outputs."""
        return tuple(self.calibrations)

    def pieces(self, text: str) -> list[list[int]]:
        """The tokens of a text in pieces of at most ``window``; none for a text without tokens."""
        ids = self.tokenizer.encode(text)
        return [ids[first : first + self.window] for first in range(0, len(ids), self.window)]

    def piece_probabilities(self, pieces: Sequence[list[int]]) -> Tensor:
        """The calibrated probability of each label for each piece: [P, L], fp32, on the CPU."""
        logits_PL = last_logits(self.model, pieces)
        fitted = list(self.calibrations.values())
        slope_L, intercept_L = (
            torch.tensor([getattr(each, name) for each in fitted]) for name in ("slope", "intercept")
        )
        return torch.sigmoid(logits_PL * slope_L + intercept_L)

    def probabilities(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The calibrated probability of each label for each text; 0 for a text without tokens."""
        pieces = [self.pieces(text) for text in texts]
        scores = iter(self.piece_probabilities([each for pieces_of_one in pieces for each in pieces_of_one]).tolist())
        return [self.of_text(list(itertools.islice(scores, len(each)))) for each in pieces]

    def of_text(self, scores_PL: Sequence[Sequence[float]]) -> dict[str, float]:
        """The labels' probabilities for a text from those of its pieces."""
        return {
            label: max((scores_L[place] for scores_L in scores_PL), default=0.0)
            for place, label in enumerate(self.labels)
        }

    def gives(self, label: str, probability: float) -> bool:
        """Whether a text of this probability is given the label."""
        return probability >= self.calibrations[label].threshold


@torch.inference_mode()
def last_logits(model: RewardModel, pieces: Sequence[list[int]]) -> Tensor:
    """What the head says at the last token of each piece, before calibration: [P, L], fp32, on the CPU."""
    device = model.score.weight.device
    # Pieces of like length stand together only where that is needed to keep batches small: none is ever padded.
    found: list[Tensor] = [torch.zeros(0, model.score.out_features)]
    first = 0
    while first < len(pieces):
        end, tokens = first + 1, len(pieces[first])
        while end < len(pieces) and tokens + len(pieces[end]) <= _BATCH_TOKENS:
            tokens += len(pieces[end])
            end += 1
        lengths = [len(piece) for piece in pieces[first:end]]
        ids_N = torch.tensor(list(itertools.chain.from_iterable(pieces[first:end])), device=device)
        positions_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
        values_NL = model(ids_N, positions_N, PackedAttention(lengths, device, config=model.config))
        last_P = torch.tensor(lengths, device=device).cumsum(0) - 1
        found.append(values_NL.view(len(ids_N), -1)[last_P].cpu())
        first = end
    return torch.cat(found)


def save_classifier(classifier: Classifier, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write everything that the folder of a classifier has."""
    tokenizer = classifier.tokenizer
    tokenizer.settings["model_max_length"] = classifier.window
    save_reward_model(
        classifier.model,
        folder,
        dtype=dtype,
        pad_token_id=tokenizer.token_id(END_OF_TEXT),
        labels=classifier.labels,
    )
    tokenizer.save(folder)
    labels = {label: asdict(fitted) for label, fitted in classifier.calibrations.items()}
    files.write_json(folder / CALIBRATION, {"window_tokens": classifier.window, "labels": labels})


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a classifier of Gale's."""
    return (folder / CALIBRATION).is_file()


def load_classifier(folder: Path, *, dtype: torch.dtype, device: torch.device | None = None) -> Classifier:
    """The classifier of a folder. Raises :class:`ModelError`."""
    content = read_json(folder / CALIBRATION)
    if not content:
        raise ModelError(
            f"{folder} holds no classifier: it has no {CALIBRATION}.", hint="Make one with `gale train classifier`."
        )
    try:
        window = int(content["window_tokens"])
        calibrations = {
            str(label): Calibration(float(each["slope"]), float(each["intercept"]), float(each["threshold"]))
            for label, each in content["labels"].items()
        }
        numbers = [number for each in calibrations.values() for number in asdict(each).values()]
        if window < 1 or not numbers or not all(map(math.isfinite, numbers)):
            raise ValueError("its numbers are none to compute with")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{folder / CALIBRATION} is damaged: {error!r}", hint="Copy the folder again.") from error
    stored = read_json(folder / "config.json").get("id2label")
    if stored != {str(place): label for place, label in enumerate(calibrations)}:
        raise ModelError(f"{folder}: config.json names the labels {stored}, but {CALIBRATION} {list(calibrations)}.")
    model = load_reward_model(folder, dtype=dtype, device=device, labels=len(calibrations))
    if window > model.config.context_length:
        raise ModelError(f"{folder}: {CALIBRATION} asks for pieces of {window} tokens, more than the model reads.")
    return Classifier(model, load_tokenizer(folder, model.config), calibrations, window=window)
