"""Classification: accuracy and macro-F1 of labels that are chosen by likelihood, written out, or a classifier's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gale.core.errors import DataError
from gale.engine.request import Engine
from gale.evals.generation import answer_all
from gale.evals.likelihood import log_likelihoods
from gale.evals.multiple_choice import continuations
from gale.evals.recipe import ClassifyTask
from gale.evals.rows import Item, shot_items, task_items
from gale.evals.scores import Score, bootstrap, share_score
from gale.evals.task import SHOWN, TaskResult
from gale.model.classifier import Classifier
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate
from gale.text.tokenizer import Tokenizer
from gale.train.calibration import Flags, Floats, expected_calibration_error

_NONE = -1
_AT_ONCE = 256  # texts of a classifier


def run_classification(task: ClassifyTask, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate) -> TaskResult:
    """Labels by the log-likelihood of their text after the prompt; the first one wins a tie."""
    items, solved, texts = task_items(task), _solved(task), task.texts
    prompts = [item.fill(task.prompt) for item in items]
    requests = [
        request for prompt in prompts for request in continuations(task, prompt, texts, solved, tokenizer, template)
    ]
    scored = log_likelihoods(model, requests, title=task.name)
    given = np.array(scored.nats).reshape(len(items), len(texts)).argmax(axis=1)
    return _result(task, items, prompts, given, {"truncated": scored.truncated})


async def run_written_classification(task: ClassifyTask, engine: Engine, tokenizer: Tokenizer) -> TaskResult:
    """Labels as the model writes them: the first label text in its answer, whatever the case; none is wrong."""
    items = task_items(task)
    prompts = [item.fill(task.prompt) for item in items]
    answers = await answer_all(task, prompts, _solved(task), engine, tokenizer)
    given = np.array([_first_label(answer.text, task.texts) for answer in answers])
    notes = {
        "too_long": sum(answer.too_long for answer in answers),
        "without_label": int((given == _NONE).sum()),
    }
    return _result(task, items, prompts, given, notes)


def run_classifier(task: ClassifyTask, classifier: Classifier) -> TaskResult:
    """Labels that a classifier gives: of several, the likeliest. One label against none is also held to its word.

    Raises :class:`DataError` where the classifier has not all the labels that the task names, but for one.
    """
    items, texts = task_items(task), task.texts
    own = [text for text in texts if text in classifier.labels]
    if len(own) < max(1, len(texts) - 1):
        raise DataError(
            f"The task {task.name} asks for the labels {', '.join(texts)}.",
            hint=f"The classifier has {', '.join(classifier.labels)}.",
        )
    prompts = [item.fill(task.prompt) for item in items]
    found = [
        scores
        for first in range(0, len(prompts), _AT_ONCE)
        for scores in classifier.probabilities(prompts[first : first + _AT_ONCE])
    ]
    given: list[int] = []
    for scores in found:
        candidates = [text for text in own if classifier.gives(text, scores[text])] or (own if own == texts else [])
        none = next((place for place, text in enumerate(texts) if text not in own), _NONE)
        given.append(texts.index(max(candidates, key=scores.__getitem__)) if candidates else none)
    result = _result(task, items, prompts, np.array(given), {})
    if len(own) == 1 and len(texts) == 2:
        chance = np.array([scores[own[0]] for scores in found])
        right = np.array([texts[_label(item, task)] == own[0] for item in items])
        result.scores.append(_calibration_score(task, chance, right))
    return result


def _calibration_score(task: ClassifyTask, chance: Floats, right: Flags) -> Score:
    """The expected calibration error; beside it, that of saying 1/2 always."""
    low, high = bootstrap(lambda chosen: expected_calibration_error(chance[chosen], right[chosen]), len(right))
    error, guessing = expected_calibration_error(chance, right), abs(0.5 - float(right.mean()))
    return Score(task.name, "ece", error, low, high, guessing, len(right), lower_is_better=True)


def macro_f1(right: NDArray[np.intp], given: NDArray[np.intp], classes: int) -> float:
    """The mean over classes of F1, which is 0 for a class that is never given, or never right."""
    total = 0.0
    for label in range(classes):
        hits = int(((right == label) & (given == label)).sum())
        both = int((right == label).sum() + (given == label).sum())
        total += 2 * hits / both if both else 0.0
    return total / classes


def _result(
    task: ClassifyTask, items: list[Item], prompts: list[str], given: NDArray[np.intp], notes: dict[str, int]
) -> TaskResult:
    texts = task.texts
    right = np.array([_label(item, task) for item in items])
    shares = np.bincount(right, minlength=len(texts)) / len(right)
    commonest = float(shares.max())
    low, high = bootstrap(lambda chosen: macro_f1(right[chosen], given[chosen], len(texts)), len(items))
    uniform = 1 / len(texts)
    f1 = Score(
        task.name,
        "macro_f1",
        macro_f1(right, given, len(texts)),
        low,
        high,
        # Of labels drawn alike: precision is the class's share, recall one in so many classes.
        float(np.mean([2 * share * uniform / (share + uniform) for share in shares])),
        len(items),
        2 * commonest / (1 + commonest) / len(texts),
    )
    points = [float(point) for point in right == given]
    return TaskResult(
        [share_score(task.name, "acc", points, chance=uniform, majority=commonest), f1],
        notes=notes,
        samples=[
            {"prompt": prompt, "expected": texts[wanted], "given": texts[place] if place != _NONE else "(none)"}
            for prompt, wanted, place in list(zip(prompts, right, given, strict=True))[:SHOWN]
        ],
    )


def _solved(task: ClassifyTask) -> list[tuple[str, str]]:
    texts = task.texts
    return [(item.fill(task.prompt), texts[_label(item, task)]) for item in shot_items(task)]


def _label(item: Item, task: ClassifyTask) -> int:
    value = str(item.value(task.label))
    if value not in task.labels:
        raise DataError(f"{item.place}: the label {value!r} is none of {', '.join(task.labels)}.")
    return task.texts.index(task.labels[value])


def _first_label(answer: str, texts: list[str]) -> int:
    """The place of the label named first; of two that begin together, such as "hate" and "hateful", the longer."""
    answer = answer.casefold()
    found = [(answer.find(text.casefold()), -len(text), place) for place, text in enumerate(texts)]
    return min((each for each in found if each[0] >= 0), default=(0, 0, _NONE))[2]
