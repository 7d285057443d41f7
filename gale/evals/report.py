"""``gale eval``: everything measured of one model, as plain data."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gale.core.device import Compute, choose_compute
from gale.core.errors import DataError, GaleError
from gale.data.clean import sample_texts
from gale.data.recipe import Source
from gale.data.source_files import missing_paths
from gale.engine.local import LocalEngine
from gale.engine.request import Engine
from gale.evals.bits_per_byte import CHANCE, bits_per_byte
from gale.evals.classification import run_classification, run_classifier, run_written_classification
from gale.evals.generation import ask, run_generation
from gale.evals.minimal_pairs import run_pairs
from gale.evals.multiple_choice import run_choices
from gale.evals.reading import answer_scores, read_and_answer, score
from gale.evals.recipe import ChoicesTask, ClassifyTask, EvalRecipe, GenerateTask, PairsTask, Task
from gale.evals.scores import Score
from gale.evals.task import TaskResult
from gale.model.checkpoint import load_model
from gale.model.classifier import is_classifier, load_classifier
from gale.model.transformer import Decoder
from gale.text.template import PLAIN_CHAT_TEMPLATE, ChatTemplate, Message
from gale.text.tokenizer import Tokenizer


def evaluate(folder: Path, recipe: EvalRecipe) -> dict[str, Any]:
    """Measure the model in ``folder``; the result is plain data. Raises ``ModelError`` or ``DataError``."""
    _require_files(recipe)
    compute = choose_compute()
    if is_classifier(folder):
        return _report(folder, recipe, compute, _by_classifier(folder, recipe, compute))
    if foreign := [task.name for task in recipe.tasks if isinstance(task, ClassifyTask) and task.by == "classifier"]:
        raise DataError(f"The task {foreign[0]} is for a classifier, which {folder} is not.")
    model = load_model(folder, dtype=compute.dtype, device=compute.device)
    tokenizer = Tokenizer.load(folder)
    texts = [
        bits_per_byte(model, tokenizer, _texts(source, recipe), window=recipe.window_tokens, title=source.split)
        for source in recipe.sources
        if source.format != "qa"
    ]
    results = {task.name: result for task in recipe.tasks if (result := _by_likelihood(task, model, tokenizer))}
    del model  # the engine opens its own
    reading, answers, read = asyncio.run(_by_engine(folder, recipe, tokenizer, results))
    return _report(folder, recipe, compute, results, texts, read, reading, answers)


def _report(
    folder: Path,
    recipe: EvalRecipe,
    compute: Compute,
    results: dict[str, TaskResult],
    texts: Sequence[Score] = (),
    read: Sequence[Score] = (),
    reading: Mapping[str, Any] = MappingProxyType({}),
    answers: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    tasks = [score for task in recipe.tasks for score in results[task.name].scores]
    scores = [*texts, *read, *tasks]
    return {
        "model": str(folder),
        "compute": compute.reason,
        "scores": [_rounded(each) for each in scores],
        "bits_per_byte": {each.task: round(each.value, 4) for each in texts},
        "chance_bits_per_byte": round(CHANCE, 4),
        "reading": dict(reading),
        "tasks": {
            task.name: {
                "kind": task.kind,
                "file": task.path.name,
                "licence": task.licence,
                "origin": task.origin,
                "shots": getattr(task, "shots", 0),
                "notes": dict(results[task.name].notes),
                "groups": [_rounded(each) for each in results[task.name].groups],
                "samples": results[task.name].samples,
            }
            for task in recipe.tasks
        },
        "answers": list(answers),
    }


def _require_files(recipe: EvalRecipe) -> None:
    paths = [*(source.path for source in recipe.sources), *(task.path for task in recipe.tasks)]
    paths += [shots for task in recipe.tasks if (shots := getattr(task, "shots_path", None)) is not None]
    if missing := missing_paths(paths):
        raise DataError(f"These held-out files do not exist: {', '.join(missing)}", hint="Check the evaluation recipe.")


def _by_classifier(folder: Path, recipe: EvalRecipe, compute: Compute) -> dict[str, TaskResult]:
    """Results of a classifier, which does nothing but give labels. Raises :class:`DataError` for what else is asked."""
    tasks = {task.name: task for task in recipe.tasks if isinstance(task, ClassifyTask) and task.by == "classifier"}
    foreign = [source.split for source in recipe.sources] + [
        each.name for each in recipe.tasks if each.name not in tasks
    ]
    if foreign or recipe.prompts:
        raise DataError(
            f"{folder} is a classifier, which cannot do {foreign[0] if foreign else 'prompts'}.",
            hint='Ask it for tasks of the kind classify with by = "classifier".',
        )
    classifier = load_classifier(folder, dtype=compute.dtype, device=compute.device)
    return {name: run_classifier(task, classifier) for name, task in tasks.items()}


def _by_likelihood(task: Task, model: Decoder, tokenizer: Tokenizer) -> TaskResult | None:
    """The result of a task that needs no text to be generated; None for the others."""
    template = ChatTemplate(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE, tokenizer)
    match task:
        case PairsTask():
            return run_pairs(task, model, tokenizer)
        case ChoicesTask():
            return run_choices(task, model, tokenizer, template)
        case ClassifyTask(by="likelihood"):
            return run_classification(task, model, tokenizer, template)
    return None


async def _by_engine(
    folder: Path, recipe: EvalRecipe, tokenizer: Tokenizer, results: dict[str, TaskResult]
) -> tuple[dict[str, Any], list[dict[str, str]], list[Score]]:
    """What the engine must write for: reading questions, prompts, and tasks, whose results go into ``results``."""
    engine = LocalEngine.load(folder)
    try:
        reading: dict[str, Any] = {}
        scores: list[Score] = []
        for source in recipe.sources:
            if source.format == "qa":
                given = await read_and_answer(
                    engine,
                    source,
                    limit=recipe.max_questions_per_source,
                    max_tokens=recipe.max_answer_tokens,
                    seed=recipe.seed,
                )
                reading[source.split] = {**score(given), "samples": [answer.as_dict() for answer in given[:8]]}
                scores += answer_scores(source.split, given)
        for task in recipe.tasks:
            match task:
                case GenerateTask():
                    results[task.name] = await run_generation(task, engine, tokenizer)
                case ClassifyTask(by="generation"):
                    results[task.name] = await run_written_classification(task, engine, tokenizer)
        answers = [
            {
                "prompt": prompt,
                "answer": await _ask_or_say_why_not(engine, prompt, recipe.max_answer_tokens),
            }
            for prompt in recipe.prompts
        ]
        return reading, answers, scores
    finally:
        await engine.close()


async def _ask_or_say_why_not(engine: Engine, prompt: str, max_tokens: int) -> str:
    try:
        return await ask(engine, [Message(role="user", content=prompt)], max_tokens)
    except GaleError as error:  # one prompt that is too long must not cost the whole evaluation
        return f"(not answered: {error.message})"


def _rounded(score: Score) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(score).items()}


def _texts(source: Source, recipe: EvalRecipe) -> Iterator[str]:
    for parts in sample_texts(source, budget=recipe.max_bytes_per_source, replace={}, seed=recipe.seed):
        yield "\n".join(parts)
