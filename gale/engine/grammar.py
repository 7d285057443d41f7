"""Answers held to a grammar: which tokens may come next, by llguidance (Earley parsing over regular lexemes).

A grammar comes from whoever asks, so it may be hostile. It is compiled in a thread of its own, before any token; its
size is bounded here, and the work that it causes, then and in each step, by llguidance's own limits. Where these do
not reach (measured: chains of 3,000 definitions overflow the stack, a ``multipleOf`` of seven digits takes 11 seconds)
the text is looked through before.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from gale.engine.request import EngineOverloadedError, Grammar, GrammarError
from gale.text.tokenizer import Tokenizer

MOST_BYTES = 64 * 1024
MOST_DEFINITIONS = 1000
MOST_MULTIPLES = 50_000  # all values of multipleOf together; their automata have as many states
_MOST_WAITING = 64

# With these the costliest grammars found took 0.6 s and 30 MB to compile, and 20 ms of a step.
_FUEL = 300_000
_SPANS_FUEL = 2_000_000  # which cost no more than their length, and that is bounded

# An indented line or a few spaces at most: left to themselves, small models write spaces without end.
_WHITESPACE = r"\n?[ \t]{0,24}"
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+0-9.eE]+)')
_DEFINITION = re.compile(r"^[^\n:\"/]*:", re.M)
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
# What a span is made of: words, and single characters where a script does not part its words.
_CHUNK = re.compile(
    r"[^\W\u0e00-\u0fff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+|.", re.S
)


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tokens between which a model thinks before it answers, and whether the prompt has begun that already."""

    opens: int
    closes: int
    begun: bool


class Grammars:
    """Compiles grammars for one model. ``end_tokens`` are allowed only where an answer may end."""

    def __init__(self, tokenizer: Tokenizer, *, vocabulary_size: int, end_tokens: Set[int]) -> None:
        self._source = tokenizer
        self._vocabulary_size = max(vocabulary_size, tokenizer.vocabulary_size)
        self._end_tokens = frozenset(token for token in end_tokens if token < tokenizer.vocabulary_size)
        self._waiting = 0
        self._worker = ThreadPoolExecutor(1, "gale-grammars")

    async def matcher(self, grammar: Grammar, thinking: Thinking | None = None) -> Matcher:
        """As :meth:`compile`, in the thread for it. Raises :class:`EngineOverloadedError` where too many wait."""
        if self._waiting >= _MOST_WAITING:
            raise EngineOverloadedError(f"{_MOST_WAITING} grammars are waiting already; try again later.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self.compile, grammar, thinking)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the thread; what waits for it is cancelled."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def compile(self, grammar: Grammar, thinking: Thinking | None = None) -> Matcher:
        """What holds one answer to ``grammar``, except for what it thinks before. Raises :class:`GrammarError`."""
        fuel = _SPANS_FUEL if grammar.kind == "spans" else _FUEL
        limits = LLParserLimits(
            initial_lexer_fuel=fuel,
            step_lexer_fuel=100_000,
            max_lexer_states=50_000,
            step_max_items=5_000,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._tokenizer, _llguidance(grammar), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some faults, such as a schema that only refers to itself, show only here
        if matcher.is_error():
            raise GrammarError(f"The grammar cannot be used: {_reason(matcher)}")
        return Matcher(matcher, self._end_tokens, self._hidden, thinking)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            ends = sorted(self._end_tokens) or [self._stand_in]
            return LLTokenizer(
                TokenizerWrapper(_Vocabulary(self._source, ends[0])), n_vocab=self._vocabulary_size, eos_token=ends
            )
        except ValueError as error:
            raise GrammarError(f"This model's tokenizer cannot be used with grammars: {error}") from error

    @property
    def _stand_in(self) -> int:
        """llguidance wants an end token; a model that has none gets one that is never allowed."""
        return self._source.vocabulary_size - 1

    @property
    def _hidden(self) -> list[int]:
        return [] if self._end_tokens else [self._stand_in]


class _Vocabulary:
    """Our tokenizer as llguidance asks for it.

    Its own reading of ``tokenizer.json`` takes a control token for what merely spells one, and so led into tokens that
    its parser then refused.
    """

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.eos_token_id = end
        self.bos_token_id = None
        self.special_token_ids = [tokenizer.vocabulary[token] for token in tokenizer.control_tokens]
        self.tokens = [tokenizer.token_bytes(token, control_tokens=True) for token in range(tokenizer.vocabulary_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("only text can be encoded")  # by which llguidance finds out
        return self._tokenizer.encode(text)


class Matcher:
    """Holds one answer to its grammar. Implements :class:`gale.engine.sampler.Constraint`.

    Used by one thread at a time. What goes wrong is raised by :meth:`commit`, where it ends this answer only.
    """

    def __init__(
        self, matcher: LLMatcher, end_tokens: Set[int], hidden: list[int], thinking: Thinking | None = None
    ) -> None:
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._hidden = hidden
        self._thinking = thinking
        self._thinks = thinking is not None and thinking.begun
        self._begun = False
        self._error: GrammarError | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing more may follow."""
        return not self._thinks and bool(self._matcher.is_stopped())

    def mask(self, logits_V: Tensor) -> None:
        """Set the scores of all tokens that may not come next to minus infinity, in place."""
        if self._thinks:
            logits_V[list(self._end_tokens)] = -torch.inf
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, count=len(logits_V), bitorder="little")
        allowed_V[self._hidden] = 0
        if self._thinking is not None and not self._begun:
            allowed_V[self._thinking.opens] = 1
        if self._matcher.is_error() or not allowed_V.any():
            self._error = GrammarError(f"The answer cannot go on within its grammar: {_reason(self._matcher)}")
        else:
            logits_V.masked_fill_(torch.from_numpy(allowed_V == 0), -torch.inf)

    def commit(self, token: int) -> None:
        """Take note that ``token`` came next. Raises :class:`GrammarError` if that or the mask before it failed."""
        if self._error is not None:
            raise self._error
        first, self._begun = not self._begun, True
        if self._thinking is not None and (self._thinks or (first and token == self._thinking.opens)):
            self._thinks = token != self._thinking.closes
        elif token not in self._end_tokens and not self._matcher.consume_token(token):
            raise GrammarError(f"The answer left its grammar: {_reason(self._matcher)}")


def json_schema_lark(schema: Any, *, lenient: bool = False) -> str:
    """A JSON Schema as it stands within a Lark grammar; ``lenient`` overlooks keywords that cannot be enforced.

    Raises :class:`GrammarError` for what is no schema.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("A JSON Schema must be an object.")
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, "lenient": lenient}})


def _llguidance(grammar: Grammar) -> str:
    """The grammar as llguidance takes it, if its size is bearable. Raises :class:`GrammarError`."""
    texts = [grammar.value] if isinstance(grammar.value, str) else list(grammar.value)
    try:
        size = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as error:
        raise GrammarError("The grammar cannot be used: it contains half of a surrogate pair.") from error
    if size > MOST_BYTES:
        raise GrammarError(f"The grammar cannot be used: it has {size} bytes, more than {MOST_BYTES}.")
    match grammar.kind:
        case "json_schema":
            try:
                lark = "start: " + json_schema_lark(json.loads(texts[0]))
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"The JSON Schema is not JSON: {error}") from error
        case "lark":
            lark = texts[0]
            if len(_DEFINITION.findall(lark)) > MOST_DEFINITIONS:
                raise GrammarError(f"The grammar cannot be used: it has more than {MOST_DEFINITIONS} definitions.")
        case "regex":
            return LLMatcher.grammar_from_regex(texts[0])
        case "choice":
            if not texts:
                raise GrammarError("A choice needs at least one option.")
            lark = "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, texts))
        case "spans":
            lark = _spans(texts, grammar.least)
    _check_multiples(lark)
    return LLMatcher.grammar_from_lark(lark)


def _spans(passages: list[str], least: int) -> str:
    """Contiguous pieces of passages, by llguidance's suffix automaton over their words."""
    if max(map(len, passages), default=0) < max(least, 1):
        raise GrammarError(f"No passage is as long as the span asked for: {max(least, 1)} characters.")
    pieces = (json.dumps({"substring_chunks": _CHUNK.findall(passage)}) for passage in passages if passage)
    return f"start: SPAN\nSPAN: PIECE & /(?s:.{{{max(least, 1)},}})/\nPIECE: " + " | ".join(
        f"%regex {piece}" for piece in pieces
    )


def _check_multiples(lark: str) -> None:
    """Bound ``multipleOf``, whose automaton has a state for each remainder."""
    plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), lark)
    total = 0
    for found in _MULTIPLE.finditer(plain):
        try:
            _, digits, exponent = Decimal(found[1]).normalize().as_tuple()
        except ArithmeticError:
            continue  # no number, as llguidance will say
        places = len(digits) + max(int(exponent), 0)
        total += 10**9 if places > 9 else int("".join(map(str, digits))) * 10 ** max(int(exponent), 0)
    if total > MOST_MULTIPLES:
        raise GrammarError(f"The grammar cannot be used: its multiples add up to more than {MOST_MULTIPLES}.")


def _reason(matcher: LLMatcher) -> str:
    """llguidance's words, without the excerpt from the grammar that may follow."""
    first, *others = str(matcher.get_error()).strip().splitlines() or ["no token fits."]
    if first.startswith("NoExtension"):
        return "no answer fits it."
    return " ".join([first[:300], *(line[:300] for line in others if line.startswith("error:"))])
