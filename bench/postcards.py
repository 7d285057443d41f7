"""A small world for reinforcement learning whose true reward is a program: postcards of made-up people.

A prompt names a person and a topic; an answer is a card of a few short clauses. The model that learns to imitate the
cards of this world often writes to somebody else or about something else, so there is much to improve, and what is
better can be counted.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from gale.text.template import GALE_CHAT_TEMPLATE
from gale.text.tokenizer import Tokenizer

NAMES = ("anna", "bruno", "clara", "david", "emma", "felix", "greta", "hugo")
TOPICS = ("sea", "snow", "garden", "market", "river", "bridge", "train", "forest")
WARM = ("lovely", "bright", "gentle", "golden", "sweet", "merry")
PLAIN = ("grey", "long", "old", "cold", "quiet", "narrow", "wide", "dusty")
VERBS = ("is", "was", "looks", "seems")
CLOSINGS = ("yours", "love", "goodbye")
CONTEXT = 64

# The gold reward: what a card is worth, from 0 to 1.
_START, _NAME, _TOPIC, _WARM_WORD, _CLOSING = 0.1, 0.15, 0.15, 0.15, 0.15
_ENOUGH_WARM_WORDS = 3
_REPEATED, _TOO_LONG, _LONGEST = 0.06, 0.03, 22


def prompt(name: str, topic: str) -> str:
    """What a person asks for."""
    return f"write to {name} about the {topic}"


def card(name: str, topic: str, chance: random.Random, *, right: float = 0.35) -> str:
    """A card as people of this world write them: with probability ``right`` each to whom and about what was asked."""
    to = name if chance.random() < right else chance.choice(NAMES)
    clauses = []
    for _ in range(chance.randint(1, 3)):
        about = topic if chance.random() < right else chance.choice(TOPICS)
        adjective = chance.choice(WARM if chance.random() < 0.25 else PLAIN)
        clauses.append(f"the {about} {chance.choice(VERBS)} {adjective}")
    closing = f" {chance.choice(CLOSINGS)}" if chance.random() < 0.5 else ""
    return f"dear {to} " + " and ".join(clauses) + closing


def gold(answer: str, expected: str) -> float:
    """The true worth of a card to ``expected``, a name and a topic.

    It is good to write to the right person about the right thing, in up to three different warm words, and to close.
    It is bad to say a word again and again, and to go on for ever.
    """
    name, topic = expected.split()
    words = answer.split()
    counts = Counter(words)
    worth = _START
    worth += _NAME * (words[:2] == ["dear", name])
    worth += _TOPIC * (topic in counts)
    worth += _WARM_WORD * min(_ENOUGH_WARM_WORDS, sum(word in counts for word in WARM))
    worth += _CLOSING * (bool(words) and words[-1] in CLOSINGS)
    content = (*NAMES, *TOPICS, *WARM, *PLAIN, *CLOSINGS, "dear")
    worth -= _REPEATED * sum(max(0, counts[word] - 1 - (word == topic)) for word in content)
    worth -= _TOO_LONG * max(0, len(words) - _LONGEST)
    return min(1.0, max(0.0, worth))


def write_world(folder: Path, *, cards: int, prompts: int, seed: int) -> dict[str, Path]:
    """Write tokenizer, cards to imitate, and prompts to train on and, of other tasks, to evaluate on; paths by name."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(name, topic) for name in NAMES for topic in TOPICS]
    rows = [(task, card(*task, chance)) for task in (chance.choice(tasks) for _ in range(cards))]
    texts = [f"{prompt(*task)} {text}" for task, text in rows]
    Tokenizer.train(texts, vocabulary_size=420, chat_template=GALE_CHAT_TEMPLATE).save(folder / "tokenizer")
    conversations = [{"messages": [*asked(task), {"role": "assistant", "content": text}]} for task, text in rows]
    held_out = max(1, cards // 50)
    paths = {
        "tokenizer": folder / "tokenizer",
        "cards": write_rows(folder / "cards.jsonl", conversations[held_out:]),
        "held_out_cards": write_rows(folder / "held_out_cards.jsonl", conversations[:held_out]),
    }
    kept = set(tasks[::4])
    chosen = {"prompts": [task for task in tasks if task not in kept] * (prompts // len(tasks) + 1)}
    chosen = {"prompts": chosen["prompts"][:prompts], "held_out": sorted(kept)}
    for name, several in chosen.items():
        questions = [{"messages": asked(task), "expected": " ".join(task)} for task in several]
        paths[name] = write_rows(folder / f"{name}.jsonl", questions)
    return paths


def asked(task: tuple[str, str]) -> list[dict[str, str]]:
    """The conversation that asks for a card."""
    return [{"role": "user", "content": prompt(*task)}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
