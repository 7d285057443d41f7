"""Programs that say how right an answer is: the same ones score an evaluation and reward a model in training.

Every verifier takes the answer, what was expected and :class:`VerifierOptions`, and returns a number from 0 to 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from pydantic import Field, field_validator

from gale.core.errors import RecipeError
from gale.core.recipe import Recipe
from gale.data.bounded_patterns import MOST_CHARACTERS, UnboundedPatternError, bounded_pattern

_BOUND_HINT = "Let each repeat end at what it cannot match itself: [^}]*} instead of .*}, and no repeat in another."


class VerifierOptions(Recipe):
    """What a verifier may be told; each reads only what concerns it."""

    ignore_case: bool = Field(default=True, description="For exact, contains, includes and regex.")
    pattern: str | None = Field(
        default=None, description="For regex: what to look for; its first group, if it has one, is what counts."
    )
    letters: str = Field(default="ABCDE", min_length=2, description="For choice: the letters that are offered.")
    tolerance: float = Field(
        default=1e-6, ge=0, description="For number: largest relative difference, unless both are whole."
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                bounded_pattern(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            except UnboundedPatternError as error:
                raise ValueError(f"{pattern!r} may take too long: {error}. {_BOUND_HINT}") from error
        return pattern


Verifier = Callable[[str, str, VerifierOptions], float]

VERIFIERS: dict[str, Verifier] = {}


def verify(kind: str, answer: str, expected: str, options: VerifierOptions | None = None) -> float:
    """How right ``answer`` is by the verifier named ``kind``: 0 is wrong, 1 is right, between them partly right.

    Raises :class:`RecipeError` where there is no such verifier.
    """
    verifier = VERIFIERS.get(kind)
    if verifier is None:
        raise RecipeError(f"There is no verifier {kind!r}; there are {', '.join(sorted(VERIFIERS))}.", [])
    return verifier(answer, expected, options or VerifierOptions())


def _named(name: str) -> Callable[[Verifier], Verifier]:
    def register(verifier: Verifier) -> Verifier:
        VERIFIERS[name] = verifier
        return verifier

    return register


@_named("exact")
def exact(answer: str, expected: str, options: VerifierOptions) -> float:
    """The same text, but for outer spaces, the full stop and quotation marks round it, and (unless told) case."""
    return float(_form(answer, options) == _form(expected, options))


@_named("contains")
def contains(answer: str, expected: str, options: VerifierOptions) -> float:
    """The expected text stands somewhere in the answer."""
    return float(_form(expected, options) in _form(answer, options))


@_named("number")
def number(answer: str, expected: str, options: VerifierOptions) -> float:
    """The last number of the answer equals the last number of what was expected.

    Reads signs, thousands (1,234), decimals, fractions (5/9) and full-width digits; ``50%`` is read as 50.
    """
    given, wanted = last_number(answer), last_number(expected)
    if given is None or wanted is None:
        return 0.0
    if given.denominator == wanted.denominator == 1:
        return float(given == wanted)
    return float(abs(given - wanted) <= Fraction(options.tolerance) * max(Fraction(1), abs(wanted)))


@_named("regex")
def regex(answer: str, expected: str, options: VerifierOptions) -> float:
    """The option ``pattern`` is found in the answer; if it has a group, that group's last finding is as expected.

    Without the option, what was expected is the pattern. Whatever the answer is, this ends within seconds: patterns
    that might not are refused (see :mod:`gale.data.bounded_patterns`), and of an answer of more than 10,000 characters
    only the last 10,000 are searched, so that ``^`` stands where they begin.
    """
    pattern = expected if options.pattern is None else options.pattern
    try:
        compiled = bounded_pattern(pattern, re.IGNORECASE if options.ignore_case else 0)
    except re.error as error:  # a row of the data; a recipe's own pattern has been checked
        raise RecipeError(f"{pattern!r} is no regular expression: {error}", []) from error
    except UnboundedPatternError as error:
        raise RecipeError(f"The pattern {pattern!r} may take too long: {error}.", [_BOUND_HINT]) from error
    found = list(compiled.finditer(answer[-MOST_CHARACTERS:]))
    if not found or options.pattern is None or not found[-1].re.groups:
        return float(bool(found))
    return exact(found[-1][1] or "", expected, options)


@_named("choice")
def choice(answer: str, expected: str, options: VerifierOptions) -> float:
    """The letter that the answer settles on is the expected one.

    That is the last one called the answer ("the answer is (B)", "答案：B"), else the one that the answer begins with
    ("B) 12", "B"), else the last one in brackets.
    """
    wanted = chosen_letter(expected, options.letters)
    return float(wanted is not None and chosen_letter(answer, options.letters) == wanted)


@_named("f1")
def overlap_f1(answer: str, expected: str, options: VerifierOptions) -> float:
    """Overlap of words, or of characters for Chinese, as SQuAD and CMRC count it (Rajpurkar et al. 2016)."""
    first, second = Counter(_words(answer)), Counter(_words(expected))
    return _f1((first & second).total(), first.total(), second.total())


@_named("equal")
def equal(answer: str, expected: str, options: VerifierOptions) -> float:
    """The very same characters."""
    return float(answer == expected)


@_named("unequal")
def unequal(answer: str, expected: str, options: VerifierOptions) -> float:
    """Anything but the very same characters."""
    return float(answer != expected)


@_named("includes")
def includes(answer: str, expected: str, options: VerifierOptions) -> float:
    """The expected characters stand somewhere in the answer, as they are but for (unless told) case."""
    if options.ignore_case:
        answer, expected = answer.casefold(), expected.casefold()
    return float(expected in answer)


def _rouge_n(length: int) -> None:
    """ROUGE-N as an F1 (Lin 2004): the overlap of runs of so many words, or characters for Chinese."""

    @_named(f"rouge_{length}")
    def rouge_n(answer: str, expected: str, options: VerifierOptions) -> float:
        """ROUGE-N as an F1 (Lin 2004): runs of so many words, or of characters for Chinese, that are in both."""
        first, second = (
            Counter(zip(*(words[start:] for start in range(length)), strict=False))
            for words in (_words(answer), _words(expected))
        )
        return _f1((first & second).total(), first.total(), second.total())


for _length in range(1, 6):
    _rouge_n(_length)


@_named("rouge_l")
def rouge_l(answer: str, expected: str, options: VerifierOptions) -> float:
    """ROUGE-L as an F1 (Lin 2004): the longest common subsequence of words, or characters for Chinese."""
    first, second = _words(answer), _words(expected)
    longest = [0] * (len(second) + 1)  # of what was read of the answer, with so much of what was expected
    for word in first:
        diagonal = 0
        for index, other in enumerate(second):
            above = longest[index + 1]
            longest[index + 1] = diagonal + 1 if word == other else max(above, longest[index])
            diagonal = above
    return _f1(longest[-1], len(first), len(second))


_NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?(?:/(\d+))?")
_MOST_DIGITS = 100


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly. None where there is none, or one with more digits than anybody means."""
    text = unicodedata.normalize("NFKC", text)
    found = list(_NUMBER.finditer(text))
    if not found or len(found[-1][0]) > _MOST_DIGITS:
        return None
    whole, part, under = found[-1].groups()
    value = Fraction(whole.replace(",", "") + (part or ""))
    if under is not None:
        if not int(under):
            return None
        value /= int(under)
    before = text[: found[-1].start()]
    # A sign is one only where it does not stand between two things, as in 12-5.
    negative = before.endswith(("-", "−")) and not re.search(r"[\w.)\]].$", before)
    return -value if negative else value


def chosen_letter(answer: str, letters: str) -> str | None:
    """See :func:`choice`; in upper case."""
    text, offered = unicodedata.normalize("NFKC", answer).strip(), f"[{re.escape(letters)}]"
    named = re.findall(
        rf"(?:answer|choice|option|答案|选择?)\W*(?:(?:is|为|是)\W*)?({offered})(?![A-Za-z])", text, re.IGNORECASE
    )
    if named:
        return str(named[-1]).upper()
    if first := re.match(rf"\W*({offered})(?![A-Za-z'])", text):
        return first[1]
    bracketed = re.findall(rf"\(({offered})\)", text)
    return str(bracketed[-1]) if bracketed else None


_QUOTES = " \"'`“”‘’「」"
_STOPS = " .。!"


def _form(text: str, options: VerifierOptions) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).split()).lstrip(_QUOTES).rstrip(_QUOTES + _STOPS)
    return text.casefold() if options.ignore_case else text


def _f1(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if common else 0.0


def _words(text: str) -> list[str]:
    """Words in lower case without their marks, and each character of Chinese ones."""
    words: list[str] = []
    for word in text.lower().split():
        kept = [c for c in word if unicodedata.category(c)[0] in "LN"]
        if any("\u4e00" <= c <= "\u9fff" for c in kept):
            words += kept
        elif kept:
            words.append("".join(kept))
    return words
