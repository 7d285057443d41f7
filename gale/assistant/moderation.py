"""Judging texts with the built-in moderation classifier, beside the engine: in a thread of its own, in small batches.

The classifier is small, so it is opened at the first text and then kept. Requests take turns: each batch is of one of
them, so that a short text waits for no more than a batch of every other request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gale.engine.request import EngineOverloadedError

if TYPE_CHECKING:
    from gale.model.classifier import Classifier

NAME = "gale-moderation"
# Tokens that are judged in one go; about a fifth of a second on two cores.
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Judgement:
    """The calibrated probability of each label, the labels that are given, and how many tokens were read."""

    scores: dict[str, float]
    given: frozenset[str]
    tokens: int


@dataclass(eq=False)
class _Job:
    """Pieces of texts; ``owners`` says of which text each is. ``next`` is the first one that is not yet judged."""

    pieces: list[list[int]]
    owners: list[int]
    done: asyncio.Future[None]
    scores: list[list[float]] = field(default_factory=list)


class Moderator:
    """The classifier of a folder (the built-in one if none is given), for one event loop.

    At most ``most_waiting`` tokens wait at once.
    """

    def __init__(self, folder: Path | None = None, *, most_waiting: int = 500_000) -> None:
        self.name = folder.name if folder else NAME
        self._folder = folder
        self._most_waiting = most_waiting
        self._waiting = 0
        self._jobs: deque[_Job] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gale-moderation")
        self._classifier: Classifier | None = None

    async def judge(self, texts: Sequence[Sequence[str]]) -> list[Judgement]:
        """A judgement for each of several texts, which may consist of parts that are read apart; the highest counts.

        Raises :class:`EngineOverloadedError` where too much is waiting already, and
        :class:`gale.core.errors.ModelError` for a folder that cannot be opened.
        """
        loop = asyncio.get_running_loop()
        classifier, pieces, owners = await loop.run_in_executor(self._thread, self._cut, texts)
        tokens = sum(map(len, pieces))
        if self._waiting + tokens > self._most_waiting:
            raise EngineOverloadedError("Too many texts wait to be judged.", hint="Ask again in a moment.")
        job = _Job(pieces, owners, loop.create_future())
        self._waiting += tokens
        try:
            if pieces:
                self._jobs.append(job)
                if self._runner is None or self._runner.done():
                    self._runner = asyncio.create_task(self._run(classifier))
                await job.done
        finally:
            self._waiting -= tokens
        by_text: list[list[list[float]]] = [[] for _ in texts]
        read = [0] * len(texts)
        for owner, scores, piece in zip(owners, job.scores, pieces, strict=True):
            by_text[owner].append(scores)
            read[owner] += len(piece)
        return [_judgement(classifier, scores, count) for scores, count in zip(by_text, read, strict=True)]

    def _cut(self, texts: Sequence[Sequence[str]]) -> tuple[Classifier, list[list[int]], list[int]]:
        """In the thread: open the classifier, unless that is done, and tokenise."""
        if self._classifier is None:
            # Imported here, so that whoever never asks does not wait for torch.
            from gale.core.device import choose_compute
            from gale.model.classifier import load_classifier
            from gale.registry.models import MODERATION

            compute = choose_compute()
            folder = self._folder or MODERATION
            self._classifier = load_classifier(folder, dtype=compute.dtype, device=compute.device)
        pieces: list[list[int]] = []
        owners: list[int] = []
        for owner, parts in enumerate(texts):
            for part in parts:
                cut = self._classifier.pieces(part)
                pieces += cut
                owners += [owner] * len(cut)
        return self._classifier, pieces, owners

    async def _run(self, classifier: Classifier) -> None:
        """Judge a batch of each request in turn until none is left."""
        loop = asyncio.get_running_loop()
        while self._jobs:
            job = self._jobs.popleft()
            if job.done.done():  # whoever asked has left
                continue
            batch = _first(job.pieces[len(job.scores) :])
            try:
                scores = await loop.run_in_executor(self._thread, classifier.piece_probabilities, batch)
            except Exception as error:
                if not job.done.done():
                    job.done.set_exception(error)
                continue
            job.scores += scores.tolist()
            if len(job.scores) < len(job.pieces):
                self._jobs.append(job)
            elif not job.done.done():
                job.done.set_result(None)


def _first(pieces: list[list[int]]) -> list[list[int]]:
    """As many of the first pieces as make a batch, but one at least."""
    tokens = 0
    for count, piece in enumerate(pieces):
        tokens += len(piece)
        if count and tokens > _BATCH_TOKENS:
            return pieces[:count]
    return pieces


def _judgement(classifier: Classifier, scores: list[list[float]], tokens: int) -> Judgement:
    of_text = classifier.of_text(scores)
    given = frozenset(label for label, score in of_text.items() if classifier.gives(label, score))
    return Judgement(of_text, given, tokens)
