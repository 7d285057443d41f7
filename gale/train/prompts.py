"""The questions of reinforcement learning: from JSON lines, or from prepared data by leaving out the last answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gale.core.errors import DataError
from gale.data.shards import TokenSplit
from gale.engine.rollouts import prompt_tokens
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is asked. ``source`` is the row it was made from where it came as JSON, {} elsewhere."""

    name: str
    ids: list[int]
    expected: str | None
    source: dict[str, Any]


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts of one split; ``left_out`` were too long. Number n of the endless sequence of shuffled epochs is a pure
    function of n and ``seed``.
    """

    prompts: list[Prompt]
    left_out: int
    seed: int

    def number(self, n: int) -> Prompt:
        """Prompt n of the endless sequence."""
        epoch, place = divmod(n, len(self.prompts))
        return self.prompts[self._order(epoch)[place]]

    @lru_cache(maxsize=2)  # noqa: B019 (one object lives as long as the run)
    def _order(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts)).tolist()
        return order


def read_prompts(path: Path, tokenizer: Tokenizer, *, most_tokens: int, seed: int) -> PromptSet:
    """Prompts of a file of JSON lines, without those of more than ``most_tokens`` tokens.

    ``{"prompt": text}`` is the beginning of a document, ``{"messages": [...]}`` a conversation to answer, in the
    tokenizer's chat template. ``expected`` is for a verifier. Raises :class:`DataError` naming the line.
    """
    if not path.is_file():
        raise DataError(f"There is no file of prompts {path}.", hint="Check the path in the recipe.")
    template = ChatTemplate(tokenizer.chat_template, tokenizer) if tokenizer.chat_template else None
    prompts: list[Prompt] = []
    for line, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
            prompts.append(_prompt(f"{path.name} line {line}", row, tokenizer, template))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{path}, line {line}: not a prompt: {reason}.",
                hint='Write {"prompt": "..."} or {"messages": [...]}, with "expected" where a verifier needs it.',
            ) from error
    return _fitting(prompts, str(path), most_tokens, seed)


def prompts_of_split(data: Path, split: str, tokenizer: Tokenizer, *, most_tokens: int, seed: int) -> PromptSet:
    """Prompts of a split of prepared conversations; the last answer of each is what is expected.

    Of preferences, the better answer is. Raises :class:`DataError` where nothing in the split answers anything.
    """
    documents = TokenSplit(data, split)
    prompts: list[Prompt] = []
    for index in range(0, len(documents), 2 if documents.pairs else 1):
        ids, trained = documents.document(index)
        answered = np.flatnonzero(trained)
        if not len(answered):
            continue
        before = np.flatnonzero(~trained[: answered[-1]])
        if not len(before):  # running text, which is trained on from its first token
            continue
        first = int(before[-1]) + 1
        expected = tokenizer.decode(ids[first : answered[-1] + 1].tolist())
        prompts.append(Prompt(documents.name_of(index), ids[:first].tolist(), expected, {}))
    if not prompts:
        raise DataError(f"The split {split!r} of {data} holds no conversations.", hint="Prepare it with format = chat.")
    return _fitting(prompts, f"the split {split!r} of {data}", most_tokens, seed)


def _prompt(name: str, row: Any, tokenizer: Tokenizer, template: ChatTemplate | None) -> Prompt:
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    expected = row.get("expected")
    if isinstance(expected, int | float):
        expected = str(expected)
    if expected is not None and not isinstance(expected, str):
        raise TypeError("'expected' is neither text nor a number")
    if "messages" in row:
        if template is None:
            raise ValueError("the model has no chat template to put 'messages' in")
        messages = [Message(role=message["role"], content=message["content"]) for message in row["messages"]]
        return Prompt(name, template.prompt(messages), expected, row)
    if not isinstance(row["prompt"], str):
        raise TypeError("'prompt' is not text")
    [ids] = prompt_tokens(tokenizer, [row["prompt"]], chat=False)
    if not ids:
        raise ValueError("'prompt' is empty")
    return Prompt(name, ids, expected, row)


def _fitting(prompts: list[Prompt], where: str, most_tokens: int, seed: int) -> PromptSet:
    if not prompts:
        raise DataError(f"There are no prompts in {where}.")
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= most_tokens]
    if not fitting:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise DataError(
            f"All prompts in {where} are too long: the shortest has {shortest} tokens, and {most_tokens} fit.",
            hint="Raise row_tokens, or lower answer_tokens.",
        )
    return PromptSet(fitting, len(prompts) - len(fitting), seed)
