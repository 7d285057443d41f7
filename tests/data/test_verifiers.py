"""Verifiers say right to what is right however it is put, and never to what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gale.core.errors import RecipeError
from gale.data.verifiers import VERIFIERS, VerifierOptions, verify


@pytest.mark.parametrize(
    ("kind", "answer", "expected", "right"),
    [
        ("exact", " In Leeds. ", "in leeds", True),
        ("exact", "“杭州”。", "杭州", True),
        ("exact", "-5", "5", False),
        ("exact", "In Leeds, I think", "in leeds", False),
        ("contains", "He lives in Leeds.", "leeds", True),
        ("contains", "He lives in Leeds.", "York", False),
        ("number", "583 - 336 = 247.", "247", True),
        ("number", "So 1,234.50 in all", "1234.5", True),
        ("number", "共 １２ 个", "12", True),
        ("number", "(5/9)", "5/9", True),
        ("number", "x = -3", "-3", True),
        ("number", "x = −3", "-3", True),
        ("number", "12-3", "3", True),
        ("number", "first 5, then 7", "5", False),
        ("number", "none", "5", False),
        ("number", "1/0", "5", False),
        ("number", "9" * 5000, "9" * 5000, False),
        ("number", "1,23", "23", True),
        ("number", "It costs $18.", "18", True),
        ("number", "0.3333333", "1/3", True),
        ("number", "0.33", "1/3", False),
        ("regex", "abc 123", r"\d{3}", True),
        ("regex", "abc 12", r"\d{3}", False),
        ("choice", "The answer is (B).", "B", True),
        ("choice", "A is wrong, so the answer is C", "C", True),
        ("choice", "B) 12 km", "B", True),
        ("choice", "答案：D", "D", True),
        ("choice", "选B", "B", True),
        ("choice", "b", "B", False),
        ("choice", "Because it is so", "B", False),
        ("choice", "A's are good. (E)", "E", True),
        ("choice", "12", "B", False),
        ("choice", "nothing", "nothing", False),
        ("equal", "Leeds", "Leeds", True),
        ("equal", "Leeds.", "Leeds", False),
        ("unequal", "Leeds.", "Leeds", True),
        ("includes", "He lives in LEEDS", "leeds", True),
        ("includes", "利兹在英国", "英国", True),
        ("rouge_l", "in the north of England", "In the North of England.", True),
        ("rouge_3", "in the north", "north the in", False),
        ("rouge_1", "", "", False),
    ],
)
def test_right_is_right_and_wrong_is_wrong(kind: str, answer: str, expected: str, right: bool) -> None:
    assert verify(kind, answer, expected) == float(right)


def test_options_are_heeded() -> None:
    strict = VerifierOptions(ignore_case=False)
    assert verify("exact", "leeds", "Leeds", strict) == 0
    assert verify("contains", "in leeds", "Leeds", strict) == 0
    boxed = VerifierOptions(pattern=r"boxed\{([^}]*)\}")
    assert verify("regex", r"\boxed{3} no, \boxed{4}", "4", boxed) == 1
    assert verify("regex", r"\boxed{3}", "4", boxed) == 0
    assert verify("choice", "B", "B", VerifierOptions(letters="AC")) == 0
    assert verify("number", "101", "100", VerifierOptions(tolerance=0.01)) == 0
    assert verify("number", "100.5", "100", VerifierOptions(tolerance=0.01)) == 1


def test_partly_right_lies_between() -> None:
    assert verify("f1", "A red car.", "A red bike.") == pytest.approx(2 / 3)
    assert verify("f1", "住在杭州", "杭州") == pytest.approx(2 / 3)


def test_an_unknown_verifier_and_a_broken_pattern_are_said() -> None:
    with pytest.raises(RecipeError, match="there are choice, contains, equal, exact, f1"):
        verify("exactly", "a", "a")
    with pytest.raises(RecipeError, match="regular expression"):
        verify("regex", "a", "(")
    with pytest.raises(ValueError, match="regular expression"):
        VerifierOptions(pattern="(")
    assert all(verifier.__doc__ for verifier in VERIFIERS.values())


@given(kind=st.sampled_from(sorted(set(VERIFIERS) - {"regex"})), answer=st.text(), expected=st.text())
def test_any_text_has_a_score_between_0_and_1(kind: str, answer: str, expected: str) -> None:
    assert 0 <= verify(kind, answer, expected) <= 1


@given(value=st.integers(-(10**12), 10**12))
def test_every_whole_number_is_read_back(value: int) -> None:
    for text in (str(value), f"{value:,}", f"is {value}.", f"= {value:,}。"):
        assert verify("number", text, str(value)) == 1
        assert verify("number", text, str(value + 1)) == 0


def test_rouge_is_the_f1_of_shared_runs_and_of_the_longest_common_sequence() -> None:
    answer, expected = "the cat sat on the mat", "the cat lay on the mat"
    assert verify("rouge_1", answer, expected) == pytest.approx(5 / 6)
    assert verify("rouge_2", answer, expected) == pytest.approx(3 / 5)
    assert verify("rouge_l", answer, expected) == pytest.approx(5 / 6)
    assert verify("rouge_l", "c b a", "a b c") == pytest.approx(1 / 3)
    assert verify("rouge_l", "风从山上来", "风从山上吹来") == pytest.approx(10 / 11)
