"""Regular expressions from data, of which only those are run that no text can make slow.

Python's ``re`` tries one way after another to match, and of some patterns, such as ``(a+)+b``, there are more ways
than anybody can wait for. So the tree of a pattern is walked from its end, counting the ways there are at most to match
what is left (after the analysis of Weideman et al. 2016, "Analyzing matching time behavior of backtracking regular
expression matchers", but coarser: it also refuses some patterns that would do).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

MOST_CHARACTERS = 10_000  # of a text: what :func:`bounded_pattern` counts with
_MOST_STEPS = 100_000  # from one place of the text; a second or a few from all
_LONGEST_PATTERN = 1000
_MOST_VISITS = 20_000  # of nodes, where repeats are written out
_WRITTEN_OUT = 8  # a repeat of at most so many is as good as that many copies
_LARGEST_RANGES = 100_000

_parser: Any = importlib.import_module("re._parser")  # what `re` itself compiles from; without stubs
_compiler: Any = importlib.import_module("re._compiler")
_ONE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REFUSED = {
    "GROUPREF": "a reference back to a group",
    "ASSERT": "a look-around with choices or repeats",
    "ASSERT_NOT": "a look-around with choices or repeats",
}
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")

_Node = tuple[Any, Any]


class UnboundedPatternError(ValueError):
    """The pattern may take too long on some text; the message says what of it."""


@lru_cache(1024)
def bounded_pattern(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """``pattern`` compiled, if a search in :data:`MOST_CHARACTERS` characters ends within seconds, whatever they are.

    Raises :class:`UnboundedPatternError`, and ``re.error`` where it is no pattern at all.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise UnboundedPatternError(f"it is longer than {_LONGEST_PATTERN} characters")
    try:
        tree = _parser.parse(pattern, flags)
        if _Walk(tree).sequence(tree, _Rest(frozenset(), True, 1)).steps > _MOST_STEPS:
            raise UnboundedPatternError("there are too many ways to match a text")
        return re.compile(pattern, flags)
    except (RecursionError, OverflowError) as error:
        raise UnboundedPatternError(f"it is too deep or too large: {error}") from error


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is left of a pattern: the characters it may begin with, whether it matches everywhere (nothing before it is
    then tried again), and how many steps it takes at most."""

    first: frozenset[str]
    free: bool
    steps: int


class _Walk:
    def __init__(self, tree: Any) -> None:
        self._state = tree.state
        self._alphabet = _alphabet(tree)
        self._visits = 0

    def sequence(self, nodes: Iterable[_Node], rest: _Rest) -> _Rest:
        """``nodes``, one after the other, before ``rest``."""
        for node in reversed(list(nodes)):
            rest = self._before(node, rest)
        return rest

    def _before(self, node: _Node, rest: _Rest) -> _Rest:
        self._visits += 1
        if self._visits > _MOST_VISITS or rest.steps > _MOST_STEPS:
            raise UnboundedPatternError("there are too many ways to match a text")
        kind, value = str(node[0]), node[1]
        if kind in _ONE:
            return _Rest(self._characters(node), False, rest.steps)
        if kind == "AT":
            return _Rest(rest.first, False, rest.steps)
        if kind in ("ASSERT", "ASSERT_NOT") and _one_way(value[1]):
            return _Rest(rest.first, False, rest.steps + value[1].getwidth()[1])
        if kind == "SUBPATTERN" and not value[1] and not value[2]:
            return self.sequence(value[3], rest)
        if kind == "ATOMIC_GROUP":
            return self.sequence(value, rest)
        if kind == "BRANCH":
            return self._any([self.sequence(choice, rest) for choice in value[1]])
        if kind in _REPEATS:
            low, high, body = value
            return self._repeated(low, high, body, rest)
        raise UnboundedPatternError(f"{_REFUSED.get(kind, 'some of its syntax')} cannot be judged")

    def _any(self, choices: Sequence[_Rest]) -> _Rest:
        first = frozenset[str]().union(*(choice.first for choice in choices))
        # Where the next character decides, one choice is followed and the others end at once.
        decided = len(first) == sum(len(choice.first) for choice in choices)
        steps = [choice.steps for choice in choices]
        return _Rest(first, any(choice.free for choice in choices), max(steps) + len(steps) if decided else sum(steps))

    def _repeated(self, low: int, high: int, body: Any, rest: _Rest) -> _Rest:
        low, high = int(low), min(int(high), MOST_CHARACTERS)
        if not _one_way(body):
            if high > _WRITTEN_OUT:
                raise UnboundedPatternError("what is repeated can itself match in several ways")
            for copy in range(high, 0, -1):
                more = self.sequence(body, rest)
                rest = more if copy <= low else self._any([more, rest])
            return rest
        first = self.sequence(body, rest).first if high else frozenset[str]()
        longest = min(high * max(1, body.getwidth()[1]), MOST_CHARACTERS)
        if low >= high:
            return _Rest(first, False, rest.steps + longest) if high else rest
        if rest.free:
            steps = rest.steps
        elif first & rest.first:
            steps = (high - low + 1) * rest.steps
        else:  # given back one by one, but the rest can begin nowhere within
            steps = longest + rest.steps
        return _Rest(first if low else first | rest.first, rest.free and not low, steps)

    def _characters(self, node: _Node) -> frozenset[str]:
        one = _parser.SubPattern(self._state, [node])
        found = _compiler.compile(one, self._state.flags).finditer(self._alphabet)
        return frozenset(match[0] for match in found)


def _one_way(nodes: Iterable[_Node]) -> bool:
    """Whether there is no more than one way to match ``nodes`` from a given place."""
    for kind, value in nodes:
        if str(kind) in _ONE or str(kind) == "AT":
            continue
        if str(kind) == "SUBPATTERN" and not value[1] and not value[2] and _one_way(value[3]):
            continue
        if str(kind) in _REPEATS and value[0] == value[1] and _one_way(value[2]):
            continue
        return False
    return True


def _alphabet(tree: Any) -> str:
    """Characters enough to tell whether two classes of the pattern have one in common.

    All that the pattern names are there, all digits and spaces, ASCII, and one of whatever else ``\\w`` tells apart.
    """
    named: set[int] = set()
    todo: list[Any] = [tree]
    while todo:
        match todo.pop():
            case (kind, int(code)) if str(kind) in ("LITERAL", "NOT_LITERAL"):
                named.add(code)
            case (kind, (int(low), int(high))) if str(kind) == "RANGE":
                if high - low > _LARGEST_RANGES or len(named) > _LARGEST_RANGES:
                    raise UnboundedPatternError("its classes of characters are too large")
                named.update(range(low, high + 1))
            case str() | int() | None:
                pass
            case several:
                todo += list(several)
    letters = "".join(map(chr, named))
    return "".join({*_common_alphabet(), *letters, *letters.lower(), *letters.upper(), *letters.swapcase()})


@cache
def _common_alphabet() -> str:
    others = (c for c in map(chr, range(128, 0x110000)) if c.isdecimal() or c.isspace())
    return "".join((*map(chr, range(128)), *others, "éıſKİ中→"))
