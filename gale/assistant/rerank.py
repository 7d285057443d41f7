"""Documents in the order in which they answer a query: what is found is sorted before a model reads it.

With ``yes`` the model reads query and document together and is asked whether one answers the other: the score is the
probability of "yes", if the answer is "yes" or "no" (after Nogueira et al. 2020). With ``embedding`` each is read by
itself and the score is the cosine of their vectors: cheaper, since documents can be short of words in common.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gale.core.errors import GaleError
from gale.engine.request import ContextLengthError, Decision, Embeddings, Reader
from gale.engine.turns import in_turns
from gale.text.template import Message

Method = Literal["yes", "embedding"]

# What is the same for all documents stands first, so that it need not be read again for each.
PROMPT = """A person asks:
{query}

A document says:
{document}

Does the document help to answer the question? Answer with "yes" or "no" alone."""
_YES, _NO = "yes", "no"
MOST_TOKENS = 300_000


class DocumentLengthError(ContextLengthError):
    """The document with number ``index``, or the query (None), is too long to be read."""

    def __init__(self, index: int | None, error: ContextLengthError) -> None:
        super().__init__(error.prompt_tokens, error.context_length)
        self.index = index


@dataclass(frozen=True, slots=True)
class Ranking:
    """Numbers of documents with their scores, best first, and how many tokens were read."""

    scores: list[tuple[int, float]]
    prompt_tokens: int


async def rerank(
    engine: Reader,
    query: str,
    documents: Sequence[str],
    *,
    method: Method = "yes",
    prompt: str = PROMPT,
    adapter: str | None = None,
) -> Ranking:
    """Score each of ``documents``; those of equal scores stay in their order.

    Raises :class:`DocumentLengthError` before anything is computed, :class:`GaleError` for a ``prompt`` without the
    places ``{query}`` and ``{document}``, and whatever the engine raises.
    """
    if method == "yes":
        prompts = await asyncio.to_thread(_prompts, engine, query, documents, prompt, adapter)
        decisions: list[Decision] = await in_turns(
            [partial(engine.decide, ids, (_YES, _NO), adapter=adapter) for ids in prompts]
        )
        scores = [decision.probabilities[0] for decision in decisions]
        tokens = sum(decision.prompt_tokens for decision in decisions)
    else:
        texts = await asyncio.to_thread(_texts, engine, query, documents)
        embeddings: Embeddings = await engine.embed(texts, adapter=adapter)
        asked, *vectors = embeddings.vectors
        scores = [sum(map(float.__mul__, asked, vector)) for vector in vectors]
        tokens = embeddings.prompt_tokens
    return Ranking(sorted(enumerate(scores), key=lambda pair: -pair[1]), tokens)


def _prompts(engine: Reader, query: str, documents: Sequence[str], prompt: str, adapter: str | None) -> list[list[int]]:
    if missing := [place for place in ("{query}", "{document}") if place not in prompt]:
        raise GaleError(f"The prompt has no place for {missing[0]}.")
    prompts: list[list[int]] = []
    for index, document in enumerate(documents):
        message = Message(role="user", content=_filled(prompt, query, document))
        try:
            ids = engine.encode_chat([message], adapter=adapter)
        except ContextLengthError as error:
            raise DocumentLengthError(index, error) from error
        prompts.append(_checked(engine, ids, index))
        _refuse_too_many(prompts)
    return prompts


def _refuse_too_many(texts: list[list[int]]) -> None:
    if sum(map(len, texts)) > MOST_TOKENS:
        raise GaleError(f"All documents together, each with the query, may have at most {MOST_TOKENS:,} tokens.")


def _filled(prompt: str, query: str, document: str) -> str:
    """In one pass, so that a query that speaks of "{document}" is left as it is."""
    return re.sub(r"\{query\}|\{document\}", lambda place: query if place[0] == "{query}" else document, prompt)


def _texts(engine: Reader, query: str, documents: Sequence[str]) -> list[list[int]]:
    texts: list[list[int]] = []
    for index, text in enumerate((query, *documents)):
        try:
            ids = engine.encode_text(text)
        except ContextLengthError as error:
            raise DocumentLengthError(index - 1 if index else None, error) from error
        texts.append(_checked(engine, ids, index - 1 if index else None))
        _refuse_too_many(texts)
    return texts


def _checked(engine: Reader, ids: list[int], index: int | None) -> list[int]:
    if len(ids) > engine.context_length:
        raise DocumentLengthError(index, ContextLengthError(len(ids), engine.context_length))
    return ids
