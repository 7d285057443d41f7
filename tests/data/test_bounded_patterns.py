"""Patterns that data brings find what ``re`` finds, and none is run that some text makes slow."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gale.core.errors import RecipeError
from gale.data.bounded_patterns import MOST_CHARACTERS, UnboundedPatternError, bounded_pattern
from gale.data.verifiers import VerifierOptions, verify

USUAL = [
    r"\d{3}",
    r"boxed\{([^}]*)\}",
    r"(\d+)\s*/\s*(\d+)",
    r"####\s*(-?[\d,.]+)",
    r"answer is:?\s*\**\(?([A-D])",
    r"The answer is (.*)\.$",
    r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    r"答案[:：是为]\s*([\u4e00-\u9fff]+)。",
    r"(?is)<answer>(.*)</answer>",
    r"(?:\d{1,3}\.){3}\d{1,3}",
    r"\b(?:yes|no|maybe)\b(?![A-Za-z])",
    r"^\s*\S+\s*$",
    "",
]
SLOW = [
    r"(a+)+b",
    r"(a|aa)*b",
    r"a*a*a*b",
    r".*\d+x",
    r"(\w+\s)*x",
    "a?" * 30 + "a" * 30,
    "(?:a|ab)(?:c|bc)" * 20 + "x",
    r"(?:a{1,100}){1,100}b",
    r"(?=a*b)c",
    r"(a)\1",
    r"\w+[٠-٩]+x",
    r"(?i)k+[K]+s+[ſ]+x",
    "(((((((a?){8}){8}){8}){8}){8}){8}){8}x",
    "a" * 1001,
    "[\x01-\U0010ffff]*x",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_find_what_re_finds_and_end_on_the_worst_of_texts(pattern: str) -> None:
    texts = [
        r"\boxed{3} The answer is (B).",
        "#### 1,234.5 or 3 / 4",
        "答案：杭州。",
        "<ANSWER>\n7</answer> 1.2.3.4 no",
    ]
    for text in texts:
        assert [m.span() for m in bounded_pattern(pattern).finditer(text)] == [
            m.span() for m in re.finditer(pattern, text)
        ]
    for piece in ("1", "a", " ", "#### ", "The answer is .", "{"):
        list(bounded_pattern(pattern).finditer(piece * (MOST_CHARACTERS // len(piece))))


@pytest.mark.parametrize("pattern", SLOW)
def test_what_some_text_makes_slow_is_refused(pattern: str) -> None:
    with pytest.raises(UnboundedPatternError):
        bounded_pattern(pattern)


@given(pattern=st.text("ab.?*+|()[]^{}2,\\d", max_size=12), text=st.text("ab1", max_size=30))
def test_any_pattern_is_refused_or_means_what_re_means(pattern: str, text: str) -> None:
    try:
        compiled = bounded_pattern(pattern)
    except (UnboundedPatternError, re.error):
        return
    assert [m.span() for m in compiled.finditer(text)] == [m.span() for m in re.finditer(pattern, text)]


def test_the_verifier_refuses_them_from_recipes_and_rows_and_searches_the_end_of_long_answers() -> None:
    with pytest.raises(ValueError, match=r"'\(a\+\)\+b' may take too long"):
        VerifierOptions(pattern="(a+)+b")
    with pytest.raises(RecipeError, match=r"'\(a\+\)\+b' may take too long") as caught:
        verify("regex", "a" * 100, "(a+)+b")
    assert "each repeat" in str(caught.value)
    assert verify("regex", "7" + " " * MOST_CHARACTERS, r"\d") == 0
    assert verify("regex", " " * 10**6 + "7", r"\d") == 1
