"""Rows of a task's file, and prompts made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gale.core.errors import DataError
from gale.data.readers import BrokenRowError, read_rows
from gale.data.source_files import find_files
from gale.evals.recipe import TaskFile, WithShots
from gale.text.template import Message


@dataclass(frozen=True, slots=True)
class Item:
    """One row; ``place`` names its file and line."""

    place: str
    row: dict[str, Any]

    def fill(self, template: str) -> str:
        """``template`` with the row's values in its braces. Raises :class:`DataError`."""
        try:
            return template.format(**self.row)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.place}: the template {template!r} cannot be filled: {error!r}.",
                hint=f"The row has the keys {', '.join(sorted(self.row))}. A brace itself is written twice.",
            ) from error

    def value(self, key: str) -> Any:
        """The value of a key. Raises :class:`DataError`."""
        if key not in self.row:
            raise DataError(f"{self.place}: the row has no key {key!r}.", hint=f"It has {', '.join(sorted(self.row))}.")
        return self.row[key]

    def text(self, key: str) -> str:
        """The value of a key that must be a text. Raises :class:`DataError`."""
        if not isinstance(value := self.value(key), str):
            raise DataError(f"{self.place}: {key!r} is no text.")
        return value


def task_items(task: TaskFile) -> list[Item]:
    """The rows that a task asks about: all, or ``limit`` of them evenly spread, for files are often sorted.

    Raises :class:`DataError`, also where there is none.
    """
    items = [item for item in _items(task.path) if not task.only or item.row.get("source") in task.only]
    if not items:
        raise DataError(f"The task {task.name} has no row in {task.path}.", hint="Check `path` and `only`.")
    if task.limit is not None and task.limit < len(items):
        items = [items[place * len(items) // task.limit] for place in range(task.limit)]
    return items


def shot_items(task: WithShots) -> list[Item]:
    """The solved examples: the first rows of their own file. Raises :class:`DataError` where it has too few."""
    if task.shots_path is None:
        return []
    items = list(itertools.islice(_items(task.shots_path), task.shots))
    if len(items) < task.shots:
        raise DataError(f"{task.shots_path} has only {len(items)} rows, not {task.shots}.")
    return items


def plain_prompt(prompt: str, solved: list[tuple[str, str]], delimiter: str) -> str:
    """Solved examples and the question as running text, empty lines between them."""
    return "".join(f"{question}{delimiter}{answer}\n\n" for question, answer in solved) + prompt


def chat_prompt(prompt: str, solved: list[tuple[str, str]]) -> list[Message]:
    """Solved examples as turns before the question."""
    messages: list[Message] = []
    for question, answer in solved:
        messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return [*messages, Message(role="user", content=prompt)]


def _items(path: Path) -> Iterator[Item]:
    for file in find_files(path).files:
        for row in read_rows(file):
            try:
                yield Item(row.place, row.parse())
            except BrokenRowError as error:
                raise DataError(f"{row.place}: {error}") from error
