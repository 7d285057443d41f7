"""Text made to be slow is read in about the time that ordinary text of its length takes.

With a pattern that can match in many ways each of these would take hours, so there is no time to compare with.
"""

from __future__ import annotations

import pytest

from gale.data.clean import normalise
from gale.data.cleaning_recipe import PersonalData
from gale.data.personal_data import redact
from gale.data.readers import markdown_text
from gale.data.verifiers import chosen_letter

ALL = PersonalData(ip=True)


def test_front_matter_without_an_end_is_text() -> None:
    page = "---\nbirds:\n" + "  - heron\n" * 2000 + "Herons wade.\n"
    assert markdown_text(page) == page


def test_spaces_within_a_line_stay_however_many_they_are() -> None:
    text = "a" + " " * 1_000_000 + "b"
    assert normalise(text + " " * 1_000_000) == text


def test_of_a_heap_of_marks_on_one_letter_thirty_stay() -> None:
    assert normalise("x" + "\u0301\u0327" * 500_000 + "y") == "x" + "\u0327" * 15 + "\u0301" * 15 + "y"
    assert normalise("e" + "\u0327\u0301") == "\u0229\u0301"


@pytest.mark.parametrize(
    "text",
    [
        "x@" + "a." * 20_000 + "1",
        "x@" + "ab." * 20_000 + "1",
        "-----BEGIN PRIVATE KEY-----" * 20_000,
        "sk-" * 50_000,
        "-eyJ" * 100_000,
        "-eyJaaaaaaaaaa." * 20_000,
        "xoxb-1234567-" * 20_000,
        "+" + "1234567890" * 20_000,
        "+1234567890123456789012345x" * 5_000,
        "1.1.1." * 20_000,
        "a:" * 50_000,
        "0" * 200_000,
        "0-" * 100_000,
    ],
    ids=lambda text: text[:16],
)
def test_what_nearly_is_personal_data_is_left_alone(text: str) -> None:
    text += " 1234567"  # enough digits for every pattern to be tried
    assert redact(text, ALL) == (text, {})


def test_a_letter_far_behind_the_word_answer_is_found() -> None:
    assert chosen_letter("answer" + " " * 200_000 + "is B", "ABCD") == "B"
    assert chosen_letter("answer" + " " * 200_000 + "x", "ABCD") is None
