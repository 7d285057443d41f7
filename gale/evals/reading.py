"""Reading: questions on a passage, on a passage that does not say, and without a passage.

The conversations are those that training would make of a held-out question-answering file, so the report says how
often the model finds the answer, and how often it admits that there is none.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gale.core.progress import Bar
from gale.data.recipe import Source
from gale.data.sources import Document, read_documents
from gale.data.verifiers import verify
from gale.engine.request import Engine
from gale.evals.generation import AT_ONCE, ask
from gale.evals.scores import Score, share_score


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with what was expected and what the model said."""

    kind: str
    question: str
    expected: str
    given: str
    alternatives: tuple[str, ...] = ()  # other answers that are as right as the expected one

    def as_dict(self) -> dict[str, Any]:
        """The row of a report."""
        row = {"kind": self.kind, "question": self.question, "expected": self.expected, "given": self.given}
        return {**row, "alternatives": list(self.alternatives)} if self.alternatives else row


async def read_and_answer(engine: Engine, source: Source, *, limit: int, max_tokens: int, seed: int) -> list[Answer]:
    """Answer the first ``limit`` questions of a source of the format qa that fit the context."""
    assert source.questions is not None
    replies = {source.questions.unanswerable_reply: "unanswerable", source.questions.closed_book_reply: "closed_book"}
    documents: list[Document] = []
    for document in read_documents(source, replace={}, seed=seed):
        prompt = list(document.messages[:-1])
        if engine.count_prompt_tokens(prompt) + max_tokens <= engine.context_length:
            documents.append(document)
        if len(documents) == limit:
            break
    places = asyncio.Semaphore(AT_ONCE)
    with Bar(f"Answering {source.split}", len(documents)) as bar:

        async def one(document: Document) -> Answer:
            expected = document.messages[-1]["content"]
            async with places:
                given = await ask(engine, list(document.messages[:-1]), max_tokens)
            bar.advance()
            kind = replies.get(expected, "grounded")
            return Answer(kind, document.messages[0]["content"], expected, given, document.alternatives)

        return list(await asyncio.gather(*map(one, documents)))


def score(answers: list[Answer]) -> dict[str, Any]:
    """Exact match and mean F1 on answerable questions; share of admissions on the others. All from 0 to 1.

    Where a question has several right answers, the one that is nearest counts, as in SQuAD (Rajpurkar et al. 2016) and
    CMRC 2018 (Cui et al. 2019). Case, punctuation and spaces do not count; F1 is over words, of Chinese over
    characters.
    ``refused_wrongly`` is the price of admitting: the share of answerable questions that were not answered.
    """
    grounded = [answer for answer in answers if answer.kind == "grounded"]
    admissions = {_plain(answer.expected) for answer in answers if answer.kind != "grounded"}
    result: dict[str, Any] = {
        "questions": len(answers),
        "exact_match": _share(map(_exact_match, grounded)),
        "f1": _share(map(_f1, grounded)),
        "refused_wrongly": _share(_plain(a.given) in admissions for a in grounded),
    }
    for kind in ("unanswerable", "closed_book"):
        chosen = [answer for answer in answers if answer.kind == kind]
        result[f"{kind}_admitted"] = _share(_plain(a.given) in admissions for a in chosen)
    return result


def answer_scores(name: str, answers: list[Answer]) -> list[Score]:
    """The figures of :func:`score` that can be set beside chance, which finds and admits nothing."""
    admissions = {_plain(answer.expected) for answer in answers if answer.kind != "grounded"}
    grounded = [answer for answer in answers if answer.kind == "grounded"]
    points = {
        "exact match": [_exact_match(answer) for answer in grounded],
        "F1": [_f1(answer) for answer in grounded],
    }
    for kind in ("unanswerable", "closed_book"):
        points[f"{kind}_admitted"] = [float(_plain(a.given) in admissions) for a in answers if a.kind == kind]
    return [share_score(name, metric, values, chance=0.0) for metric, values in points.items() if values]


def _exact_match(answer: Answer) -> float:
    return float(_plain(answer.given) in map(_plain, (answer.expected, *answer.alternatives)))


def _f1(answer: Answer) -> float:
    return max(verify("f1", answer.given, right) for right in (answer.expected, *answer.alternatives))


def _share(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return round(sum(numbers) / len(numbers), 4) if numbers else None


def _plain(text: str) -> str:
    """Text without case, punctuation and spaces."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c)[0] in "LN")
