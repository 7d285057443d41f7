"""Gale answers as OpenAI's own OpenAPI document says, and ignores none of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.checker import Checker
from tests.conformance.live import compared
from tests.conformance.parameters import Parameters
from tests.conformance.report import markdown, score

# Raised with every operation that is added.
FEWEST_OPERATIONS = 75


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checker, dict[str, Parameters]]]:
    with compared(tmp_path_factory.mktemp("conformance")) as both:
        yield both


def test_every_answer_fits_its_schema(found: tuple[Checker, dict[str, Parameters]]) -> None:
    problems = {name: checked.problems for name, checked in found[0].checked.items() if checked.problems}
    assert problems == {}
    assert score(*found).offered >= FEWEST_OPERATIONS


def test_no_parameter_is_silently_ignored(found: tuple[Checker, dict[str, Parameters]]) -> None:
    assert score(*found).ignored == ()


def test_the_published_page_says_the_same(found: tuple[Checker, dict[str, Parameters]]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    assert page == markdown(*found), "run: python -m tests.conformance"
