"""Classification: accuracy and macro-F1 of labels that are chosen by likelihood or written out."""

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
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate
from gale.text.tokenizer import Tokenizer

_NONE = -1


def run_classification(task: ClassifyTask, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate) -> TaskResult:
    """Labels by the log-likelihood of their text after the prompt; the first one wins a tie."""
    items, solved, texts = task_items(task), _solved(task), list(task.labels.values())
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
    given = np.array([_first_label(answer.text, list(task.labels.values())) for answer in answers])
    notes = {
        "too_long": sum(answer.too_long for answer in answers),
        "without_label": int((given == _NONE).sum()),
    }
    return _result(task, items, prompts, given, notes)


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
    names, texts = list(task.labels), list(task.labels.values())
    right = np.array([_label(item, task) for item in items])
    shares = np.bincount(right, minlength=len(names)) / len(right)
    commonest = float(shares.max())
    low, high = bootstrap(lambda chosen: macro_f1(right[chosen], given[chosen], len(names)), len(items))
    uniform = 1 / len(names)
    f1 = Score(
        task.name,
        "macro_f1",
        macro_f1(right, given, len(names)),
        low,
        high,
        # Of labels drawn alike: precision is the class's share, recall one in so many classes.
        float(np.mean([2 * share * uniform / (share + uniform) for share in shares])),
        len(items),
        2 * commonest / (1 + commonest) / len(names),
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
    texts = list(task.labels.values())
    return [(item.fill(task.prompt), texts[_label(item, task)]) for item in shot_items(task)]


def _label(item: Item, task: ClassifyTask) -> int:
    value = str(item.value(task.label))
    if value not in task.labels:
        raise DataError(f"{item.place}: the label {value!r} is none of {', '.join(task.labels)}.")
    return list(task.labels).index(value)


def _first_label(answer: str, texts: list[str]) -> int:
    """The place of the label named first; of two that begin together, such as "hate" and "hateful", the longer."""
    answer = answer.casefold()
    found = [(answer.find(text.casefold()), -len(text), place) for place, text in enumerate(texts)]
    return min((each for each in found if each[0] >= 0), default=(0, 0, _NONE))[2]
