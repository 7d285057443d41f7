"""Multiple choice by log-likelihood, with the three ways to compare choices of different length.

``acc``, ``acc_norm`` (per character) and ``acc_bytes`` (per UTF-8 byte) are lm-evaluation-harness's, to the letter.
"""

from __future__ import annotations

import re

import numpy as np

from gale.core.errors import DataError
from gale.evals.likelihood import Request, log_likelihoods, split_text
from gale.evals.recipe import ChoicesTask, ClassifyTask
from gale.evals.rows import Item, chat_prompt, plain_prompt, shot_items, task_items
from gale.evals.scores import share_score
from gale.evals.task import SHOWN, TaskResult, group_scores
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate
from gale.text.tokenizer import Tokenizer


def run_choices(task: ChoicesTask, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate) -> TaskResult:
    """The share of questions whose right choice is the likeliest; the first one wins a tie."""
    items, solved = task_items(task), [_solved(item, task) for item in shot_items(task)]
    prompts = [item.fill(task.prompt) for item in items]
    offered = [_choices(item, task) for item in items]
    answers = [_answer(item, task, len(choices)) for item, choices in zip(items, offered, strict=True)]
    requests = [
        request
        for prompt, choices in zip(prompts, offered, strict=True)
        for request in continuations(task, prompt, choices, solved, tokenizer, template)
    ]
    scored = log_likelihoods(model, requests, title=task.name)
    points: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    chosen: list[int] = []
    start = 0
    for choices, answer in zip(offered, answers, strict=True):
        nats = np.array(scored.nats[start : start + len(choices)])
        start += len(choices)
        characters = np.array([float(len(choice)) for choice in choices])
        size = np.array([float(len(choice.encode("utf-8", "surrogatepass"))) for choice in choices])
        for metric, values in (("acc", nats), ("acc_norm", nats / characters), ("acc_bytes", nats / size)):
            points[metric].append(float(np.argmax(values) == answer))
        chosen.append(int(np.argmax(nats)))
    chances = [1 / len(choices) for choices in offered]
    commonest = max(np.bincount(answers)) / len(answers)
    names = [str(item.value(task.group)) for item in items] if task.group else None
    return TaskResult(
        [
            share_score(task.name, metric, values, chance=sum(chances) / len(chances), majority=float(commonest))
            for metric, values in points.items()
        ],
        group_scores(names, "acc", points["acc"], chances),
        {"truncated": scored.truncated},
        [
            {"prompt": prompt, "expected": choices[answer], "given": choices[given]}
            for prompt, choices, answer, given in list(zip(prompts, offered, answers, chosen, strict=True))[:SHOWN]
        ],
    )


def continuations(
    task: ChoicesTask | ClassifyTask,
    prompt: str,
    texts: list[str],
    solved: list[tuple[str, str]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> list[Request]:
    """Each of ``texts`` as what follows the prompt: in the assistant's turn of a chat, or in running text."""
    if task.chat:
        read = template.prompt(chat_prompt(prompt, solved))
        return [Request(read, tokenizer.encode(text)) for text in texts]
    context = plain_prompt(prompt, solved, task.delimiter)
    return [split_text(tokenizer, context, task.delimiter + text) for text in texts]


def _solved(item: Item, task: ChoicesTask) -> tuple[str, str]:
    choices = _choices(item, task)
    return item.fill(task.prompt), choices[_answer(item, task, len(choices))]


def _choices(item: Item, task: ChoicesTask) -> list[str]:
    values = item.value(task.choices)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise DataError(f"{item.place}: {task.choices!r} is no list of at least two texts.")
    choices = [re.sub(rf"\A(?:{task.strip})", "", value) if task.strip else value for value in values]
    if not all(choices):
        raise DataError(f"{item.place}: one of the choices is empty.")
    return choices


def _answer(item: Item, task: ChoicesTask, count: int) -> int:
    """The place of the right choice, given from 0 or as a letter."""
    value = item.value(task.answer)
    if isinstance(value, str) and len(value) == 1 and value.isalpha():
        value = ord(value.upper()) - ord("A")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise DataError(f"{item.place}: {task.answer!r} is neither a place from 0 to {count - 1} nor a letter.")
    return value
