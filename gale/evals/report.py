"""``gale eval``: everything measured of one model, as data and as a page to read."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gale.core.device import choose_compute
from gale.core.errors import DataError, GaleError
from gale.data.clean import sample_texts
from gale.data.recipe import Source
from gale.engine.local import LocalEngine
from gale.engine.request import Engine
from gale.evals.bits_per_byte import bits_per_byte
from gale.evals.reading import ask, read_and_answer, score
from gale.evals.recipe import EvalRecipe
from gale.model.checkpoint import load_model
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer


def evaluate(folder: Path, recipe: EvalRecipe) -> dict[str, Any]:
    """Measure the model in ``folder``; the result is plain data. Raises ``ModelError`` or ``DataError``."""
    missing = [str(source.path) for source in recipe.sources if not source.path.is_file()]
    if missing:
        raise DataError(f"These held-out files do not exist: {', '.join(missing)}", hint="Check the evaluation recipe.")
    compute = choose_compute()
    model = load_model(folder, dtype=compute.dtype, device=compute.device)
    tokenizer = Tokenizer.load(folder)
    text_scores = {
        source.split: round(
            bits_per_byte(model, tokenizer, _texts(source, recipe), window=recipe.window_tokens, title=source.split),
            4,
        )
        for source in recipe.sources
        if source.format != "qa"
    }
    del model  # the engine opens its own
    reading, answers = asyncio.run(_answers(folder, recipe))
    return {
        "model": str(folder),
        "compute": compute.reason,
        "bits_per_byte": text_scores,
        "chance_bits_per_byte": round(math.log2(256), 4),
        "reading": reading,
        "answers": answers,
    }


async def _answers(folder: Path, recipe: EvalRecipe) -> tuple[dict[str, Any], list[dict[str, str]]]:
    engine = LocalEngine.load(folder)
    try:
        reading = {}
        for source in recipe.sources:
            if source.format == "qa":
                given = await read_and_answer(
                    engine,
                    source,
                    limit=recipe.max_questions_per_source,
                    max_tokens=recipe.max_answer_tokens,
                    seed=recipe.seed,
                )
                reading[source.split] = {**score(given), "samples": [asdict(answer) for answer in given[:8]]}
        answers = [
            {
                "prompt": prompt,
                "answer": await _ask_or_say_why_not(engine, prompt, recipe.max_answer_tokens),
            }
            for prompt in recipe.prompts
        ]
        return reading, answers
    finally:
        await engine.close()


async def _ask_or_say_why_not(engine: Engine, prompt: str, max_tokens: int) -> str:
    try:
        return await ask(engine, [Message(role="user", content=prompt)], max_tokens)
    except GaleError as error:  # one prompt that is too long must not cost the whole evaluation
        return f"(not answered: {error.message})"


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# Evaluation of {report['model']}", "", "## Bits per byte (lower is better; 8 is chance)", ""]
    lines += [f"- {name}: {value:.3f}" for name, value in report["bits_per_byte"].items()]
    for name, scores in report["reading"].items():
        lines += ["", f"## {name}", ""]
        lines += [
            f"- {key.replace('_', ' ')}: {value}"
            for key, value in scores.items()
            if key != "samples" and value is not None
        ]
    if report["answers"]:
        lines += ["", "## Answers", ""]
        for item in report["answers"]:
            lines += [f"**{item['prompt']}**", "", item["answer"] or "(nothing)", ""]
    return "\n".join(lines) + "\n"


def _texts(source: Source, recipe: EvalRecipe) -> Iterator[str]:
    for parts in sample_texts(source, budget=recipe.max_bytes_per_source, replace={}, seed=recipe.seed):
        yield "\n".join(parts)
