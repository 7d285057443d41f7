"""Titles made from first messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gale.platform.text import storable, title_from


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Hello", "Hello"),
        ("  two\n\nlines\tand tabs ", "two lines and tabs"),
        ("word " * 20, "word " * 11 + "word…"),
        ("x" * 100, "x" * 60 + "…"),
        ("你好" * 50, "你好" * 30 + "…"),
        ("a" * 59 + "e\u0301" * 9, "a" * 59 + "…"),
        ("a" * 58 + "👩\u200d💻" * 9, "a" * 58 + "…"),
        ("", ""),
    ],
)
def test_titles(text: str, title: str) -> None:
    assert title_from(text) == title


@given(st.text(st.characters(), max_size=300))
def test_any_text_gives_a_short_storable_line(text: str) -> None:
    title = title_from(text)
    assert len(title) <= 61
    assert title == storable(title)
    assert title.splitlines() in ([], [title])
    assert bool(title) == bool(text.split())
