"""Documents are sorted by the probability of "yes" or by the cosine, and what is too long is named."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from gale.assistant.rerank import PROMPT, DocumentLengthError, rerank
from gale.core.errors import GaleError
from gale.engine.local import LocalEngine
from gale.model.transformer import Decoder
from gale.text.template import Message
from gale.text.tokenizer import Tokenizer

QUERY = "Where does the {document} river go?"
DOCUMENTS = ["It goes to the sea.", "The door fell shut.", "河流去大海。", "{query}"]


@pytest.fixture(scope="module")
def engine(model: Decoder, tokenizer: Tokenizer) -> Iterator[LocalEngine]:
    opened = LocalEngine(model, tokenizer, model_id="tiny")
    yield opened
    asyncio.run(opened.close())


def test_the_score_is_the_probability_of_yes(engine: LocalEngine) -> None:
    ranking = asyncio.run(rerank(engine, QUERY, DOCUMENTS))
    expected = []
    tokens = 0
    for document in DOCUMENTS:
        head, middle, tail = PROMPT.replace("{query}", "\0").replace("{document}", "\0").split("\0")
        prompt = engine.encode_chat([Message(role="user", content=head + QUERY + middle + document + tail)])
        decision = asyncio.run(engine.decide(prompt, ["yes", "no"]))
        expected.append(decision.probabilities[0])
        tokens += decision.prompt_tokens
    assert dict(ranking.scores) == pytest.approx(dict(enumerate(expected)), abs=1e-4)
    assert [score for _, score in ranking.scores] == sorted((score for _, score in ranking.scores), reverse=True)
    assert ranking.prompt_tokens == tokens


def test_the_prompt_may_be_another(engine: LocalEngine) -> None:
    usual, other = (
        dict(asyncio.run(rerank(engine, QUERY, DOCUMENTS, prompt=prompt)).scores)
        for prompt in (PROMPT, "{document} {query}: yes?")
    )
    assert usual != other
    with pytest.raises(GaleError, match=r"no place for \{document\}"):
        asyncio.run(rerank(engine, QUERY, DOCUMENTS, prompt="{query}"))


def test_by_embedding_the_score_is_the_cosine(engine: LocalEngine) -> None:
    ranking = asyncio.run(rerank(engine, DOCUMENTS[1], DOCUMENTS, method="embedding"))
    vectors = torch.tensor(asyncio.run(engine.embed([DOCUMENTS[1], *DOCUMENTS], normalise=False)).vectors)
    expected = torch.cosine_similarity(vectors[:1], vectors[1:]).tolist()
    assert dict(ranking.scores) == pytest.approx(dict(enumerate(expected)), abs=1e-4)
    assert ranking.scores[0] == (1, pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize("method", ["yes", "embedding"])
@pytest.mark.parametrize("text", ["sea " * 900, "a" * 8_000_000])
def test_a_document_that_is_too_long_is_named_before_anything_is_read(
    engine: LocalEngine, method: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_run", lambda *_: pytest.fail("read"))
    with pytest.raises(DocumentLengthError) as caught:
        asyncio.run(rerank(engine, "a", ["b", text], method=method))  # type: ignore[arg-type]
    assert caught.value.index == 1
