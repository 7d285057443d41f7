"""A reward model judges pairs that it has never seen, and DPO makes answers pass a verifier that it has never seen.

The task is a program: an answer is a row of words, and it passes where gold stands in it oftener than mud. A base model
that writes rows of words at random passes about a third of the time; the pairs it learns from say only which of two
rows is better.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gale.data.prepare import prepare
from gale.data.recipe import DataRecipe
from gale.engine.local import LocalEngine
from gale.engine.request import SamplingParams, TextDelta
from gale.text.template import GALE_CHAT_TEMPLATE, Message
from gale.text.tokenizer import Tokenizer
from gale.train.dpo import dpo
from gale.train.pretrain import pretrain
from gale.train.recipe import DpoRecipe, PretrainRecipe, RewardRecipe
from gale.train.reward import reward
from tests.tiny_data import write_jsonl
from tests.train.preferences import prepare_pairs
from tests.train.runs import metrics

WORDS = ("gold", "mud", "hill", "sea", "door", "wind")
LENGTH = 5
PROMPTS = [f"After {one} and {two}" for one in WORDS for two in WORDS]
COMMON: dict[str, Any] = {
    "batch_rows": 16,
    "micro_rows": 16,
    "row_tokens": 32,
    "precision": "fp32",
    "export": "fp32",
    "evaluate_every": 1000,
    "evaluate_rows": 200,
    "checkpoint_every": 1000,
}


def lead(answer: str) -> int:
    """How much oftener gold stands in the answer than mud."""
    words = answer.split()
    return words.count("gold") - words.count("mud")


def row_of_words(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(LENGTH))


def pairs(prompts: list[str], count: int, draw: random.Random) -> Iterator[dict[str, str]]:
    while count:
        prompt, one, other = draw.choice(prompts), row_of_words(draw), row_of_words(draw)
        if lead(one) > lead(other):
            count -= 1
            yield {"prompt": prompt, "chosen": one, "rejected": other}


@dataclass(frozen=True)
class Task:
    """A base model, preferences with a held-out split, and prompts that stand in none of the training pairs."""

    base: Path
    data: Path
    held_out: list[str]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    draw = random.Random(1)
    prompts = draw.sample(PROMPTS, len(PROMPTS))
    known, held_out = prompts[:-12], prompts[-12:]
    chats = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": row_of_words(draw)}]}
        for prompt in PROMPTS * 24
    ]
    texts = [f"{chat['messages'][0]['content']} {chat['messages'][1]['content']}" for chat in chats]
    tokenizer = Tokenizer.train(texts, vocabulary_size=300, chat_template=GALE_CHAT_TEMPLATE)
    tokenizer.save(folder / "tokenizer")
    source = {"licence": "CC0", "origin": "made here", "format": "chat"}
    sources = [{**source, "path": str(write_jsonl(folder / "chats.jsonl", chats))}]
    recipe = {"tokenizer": str(folder / "tokenizer"), "sources": sources}
    prepare(DataRecipe.model_validate(recipe), folder / "chats")
    shape = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16}
    fields = COMMON | {"data": str(folder / "chats"), "steps": 120, "model": shape | {"context_length": 64}}
    optimiser = {"learning_rate": 1e-2, "warmup_steps": 10}
    pretrain(PretrainRecipe.model_validate(fields | {"optimiser": optimiser}), folder / "base")
    data = prepare_pairs(tokenizer, folder, list(pairs(known, 600, draw)), list(pairs(held_out, 200, draw)))
    return Task(folder / "base" / "model", data, held_out)


def passes(folder: Path, prompts: list[str]) -> list[bool]:
    """Whether each prompt's sampled answer passes, in order."""

    async def ask(engine: LocalEngine, prompt: str, seed: int) -> bool:
        sampling = SamplingParams(max_tokens=24, seed=seed)
        events = engine.chat([Message(role="user", content=prompt)], sampling)
        return lead("".join([event.text async for event in events if isinstance(event, TextDelta)])) > 0

    async def run() -> list[bool]:
        engine = LocalEngine.load(folder)
        try:
            return await asyncio.gather(*(ask(engine, prompt, seed) for seed, prompt in enumerate(prompts)))
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.slow
def test_a_reward_model_tells_the_better_of_pairs_it_has_not_seen(task: Task, tmp_path: Path) -> None:
    fields = COMMON | {"data": str(task.data), "base": str(task.base), "steps": 100}
    optimiser = {"learning_rate": 3e-3, "warmup_steps": 10}
    reward(RewardRecipe.model_validate(fields | {"optimiser": optimiser}), tmp_path / "run")
    accuracy = metrics(tmp_path / "run")[-1]["held_out"]["held_accuracy"]
    assert accuracy >= 0.75


@pytest.mark.slow
def test_dpo_raises_the_pass_rate_on_prompts_it_has_not_seen(task: Task, tmp_path: Path) -> None:
    fields = COMMON | {"data": str(task.data), "base": str(task.base), "steps": 100}
    optimiser = {"learning_rate": 2e-3, "warmup_steps": 10}
    dpo(DpoRecipe.model_validate(fields | {"optimiser": optimiser}), tmp_path / "run")
    answers = [passes(folder, task.held_out * 16) for folder in (task.base, tmp_path / "run/model")]
    before, after = (np.array(each).reshape(16, -1).mean(0) for each in answers)  # the share of each prompt
    gains = after - before
    resampled = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
    low = float(np.quantile(gains[resampled].mean(1), 0.025))
    assert gains.mean() >= 0.15
    assert low > 0
    assert metrics(tmp_path / "run")[-1]["held_out"]["held_accuracy"] > 0.75
