"""Answers written by the engine, and tasks whose answers a verifier judges."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gale.core.progress import Bar
from gale.data.verifiers import verify
from gale.engine.request import ContextLengthError, Engine, SamplingParams, TextDelta
from gale.evals.recipe import ClassifyTask, GenerateTask
from gale.evals.rows import chat_prompt, plain_prompt, shot_items, task_items
from gale.evals.scores import share_score
from gale.evals.task import SHOWN, TaskResult
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer

# Questions answered side by side; the engine batches them.
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Given:
    """What the model wrote; ``too_long`` where the prompt left no room for an answer."""

    text: str
    too_long: bool = False


async def ask(engine: Engine, messages: list[Message], max_tokens: int, stop: tuple[str, ...] = ()) -> str:
    """The engine's greedy answer in a chat."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, stop=stop)
    return "".join([event.text async for event in engine.chat(messages, sampling) if isinstance(event, TextDelta)])


async def answer_all(
    task: GenerateTask | ClassifyTask,
    prompts: list[str],
    solved: list[tuple[str, str]],
    engine: Engine,
    tokenizer: Tokenizer,
) -> list[Given]:
    """The greedy answer to every prompt, in order."""
    places = asyncio.Semaphore(AT_ONCE)
    stop = task.stop if isinstance(task, GenerateTask) else ()
    delimiter = task.delimiter if isinstance(task, ClassifyTask) else " "
    with Bar(f"Answering {task.name}", len(prompts)) as bar:

        async def one(prompt: str) -> Given:
            async with places:
                try:
                    if task.chat:
                        text = await ask(engine, chat_prompt(prompt, solved), task.max_tokens, stop)
                    else:
                        read = tokenizer.encode(plain_prompt(prompt, solved, delimiter))
                        sampling = SamplingParams(max_tokens=task.max_tokens, temperature=0, stop=stop)
                        events = engine.complete(read, sampling)
                        text = "".join([event.text async for event in events if isinstance(event, TextDelta)])
                    given = Given(text)
                except ContextLengthError:
                    given = Given("", too_long=True)
            bar.advance()
            return given

        return list(await asyncio.gather(*map(one, prompts)))


async def run_generation(task: GenerateTask, engine: Engine, tokenizer: Tokenizer) -> TaskResult:
    """The mean of the verifier's points. A prompt too long for the model counts as answered wrongly."""
    items = task_items(task)
    solved = [(item.fill(task.prompt), item.fill(task.expected)) for item in shot_items(task)]
    prompts = [item.fill(task.prompt) for item in items]
    expected = [item.fill(task.expected) for item in items]
    answers = await answer_all(task, prompts, solved, engine, tokenizer)
    points = [
        0.0 if given.too_long else verify(task.verifier, given.text, wanted, task.options)
        for given, wanted in zip(answers, expected, strict=True)
    ]
    chance = 1 / len(task.options.letters) if task.verifier == "choice" else 0.0
    return TaskResult(
        [share_score(task.name, task.verifier, points, chance=chance)],
        notes={"too_long": sum(given.too_long for given in answers)},
        samples=[
            {"prompt": prompt, "expected": wanted, "given": given.text, "points": round(point, 4)}
            for prompt, wanted, given, point in list(zip(prompts, expected, answers, points, strict=True))[:SHOWN]
        ],
    )
