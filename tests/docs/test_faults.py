"""docs/faults.md speaks of every fault, in both languages alike, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("faults.md", "faults.zh.md")
LINK = re.compile(r"\[`([^`]+)`\]\(([^)]+)\)")


def rows(page: str) -> list[tuple[int, str, list[tuple[str, str]]]]:
    """Of each line of the tables its number, what Gale does, and the names and places of its tests."""
    lines = [line.split(" | ") for line in (DOCS / page).read_text().splitlines() if re.match(r"\| \d", line)]
    return [(int(number.removeprefix("| ")), does, LINK.findall(shown)) for number, _, does, shown in lines]


@pytest.mark.parametrize("page", PAGES)
def test_every_fault_has_a_test(page: str) -> None:
    assert [number for number, _, _ in rows(page)] == list(range(1, 71))
    assert [number for number, does, tests in rows(page) if not (does and tests)] == []


def test_both_languages_name_the_same_tests_and_leave_the_same_open() -> None:
    english, chinese = map(rows, PAGES)
    assert [tests for _, _, tests in english] == [tests for _, _, tests in chinese]
    for word, translated in (("Not offered yet", "尚未提供"), ("Accepted:", "接受的风险：")):
        left = [
            [number for number, does, _ in page if word in does or translated in does] for page in (english, chinese)
        ]
        assert left[0] == left[1] != []


def test_every_named_test_exists() -> None:
    for number, _, tests in rows(PAGES[0]):
        for name, place in tests:
            path = (DOCS / place).resolve()
            file, _, function = name.partition("::")
            assert path.name == file and path.is_file(), f"row {number}: {place}"
            found = re.search(rf"^(async def|def|class) {function}\b", path.read_text(), re.MULTILINE)
            assert found or path.suffix == ".ts", f"row {number}: {name}"
