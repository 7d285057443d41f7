"""How much of a prompt is read beside answers, so that nobody who reads an answer notices that others ask.

Reading prompts in chunks beside answers follows Agrawal et al. 2023 (Sarathi); here the chunk follows from measured
times instead of a fixed number, because they differ a hundredfold between machines and models.
"""

from __future__ import annotations

_LEAST = 16
_MIXED_IN_A_ROW = 32
_NEW = 0.3  # share of the newest measurement


class Pace:
    """Chunks of at most ``most`` tokens such that a step takes ``stretch`` times one that reads no prompt.

    With a stretch of 2.8 answers go on at 36% of their speed at worst, and a prompt is read at 64%.
    """

    def __init__(self, most: int, stretch: float = 2.8) -> None:
        self._most = most
        self._stretch = stretch
        self._answer_s: float | None = None  # a step of answers alone
        self._token_s: float | None = None  # what one token of a prompt adds
        self._mixed = 0

    def chunk(self, answering: int) -> int:
        """Prompt tokens for a step in which so many sequences are answering."""
        if not answering:
            return self._most
        if self._mixed >= _MIXED_IN_A_ROW:  # time to measure a step of answers alone
            return 0
        if self._answer_s is None or self._token_s is None:
            return _LEAST
        tokens = int((self._stretch - 1) * self._answer_s / self._token_s)
        return min(max(tokens // _LEAST * _LEAST, _LEAST), self._most)

    def note(self, answering: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if not prompt_tokens:
            self._answer_s = _blend(self._answer_s, seconds)
            self._mixed = 0
            return
        self._mixed += answering > 0
        beside = (self._answer_s or 0.0) if answering else 0.0
        self._token_s = _blend(self._token_s, max(seconds - beside, seconds / 10) / prompt_tokens)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW) * old + _NEW * new
