"""Scores of tokens as OpenAI shows them: in parallel lists for completions, one by one for chat."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from gale.engine.request import Engine, TokenScore

# Scores of one request, each a token with its log-probability: all are held until the answer is sent, at about 100
# bytes each, and a small request can ask for very many.
MOST_SCORES = 2**21


class LogprobLists:
    """Turns the scores of one choice into ``tokens``, ``token_logprobs``, ``top_logprobs`` and ``text_offset``.

    Offsets count characters of the choice's text; a token that ends a character begun before it stands at that
    character's place. With ``as_ids`` tokens stand as ``token_id:N`` in place of their text, as vLLM can do it.
    """

    def __init__(self, engine: Engine, *, as_ids: bool = False) -> None:
        self._engine = engine
        self._as_ids = as_ids
        self._characters = 0
        # Counts as people see them: bytes that are no character show as one replacement character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def lists(self, scores: Iterable[TokenScore], *, prompt: bool = False) -> dict[str, list[Any]]:
        """The next scores; a ``prompt`` shows its control tokens, an answer does not."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            added = self._engine.token_bytes(score.token, control_tokens=prompt)
            begun = bool(self._decoder.getstate()[0])
            breaks_off = begun and bool(added) and not _continues(added[0])
            shown["tokens"].append(_text(self._engine, score.token, as_ids=self._as_ids))
            shown["token_logprobs"].append(score.logprob)
            shown["top_logprobs"].append(None if score.logprob is None else self._top(score, score.logprob))
            shown["text_offset"].append(self._characters + breaks_off)
            self._characters += len(self._decoder.decode(added))
        return shown

    def _top(self, score: TokenScore, logprob: float) -> dict[str, float]:
        """The likeliest tokens and the one that stands there, best first. Two tokens never share a key."""
        top: dict[str, float] = {}
        chosen = () if any(token == score.token for token, _ in score.top) else ((score.token, logprob),)
        for token, value in (*score.top, *chosen):
            text = _text(self._engine, token, as_ids=self._as_ids)
            top[text if text not in top else f"token_id:{token}"] = value
        return top


def chat_logprobs(engine: Engine, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice: each token with its bytes, and the likeliest in its place likewise."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = engine.token_bytes(token, control_tokens=True)
        return {"token": _text(engine, token), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(score.token, score.logprob), "top_logprobs": [entry(token, value) for token, value in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _text(engine: Engine, token: int, *, as_ids: bool = False) -> str:
    """A token by itself; one that is no whole text is spelled out as OpenAI does, ``bytes:\\xe4\\xbd``."""
    if as_ids:
        return f"token_id:{token}"
    data = engine.token_bytes(token, control_tokens=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 goes on with a character."""
    return byte & 0xC0 == 0x80
