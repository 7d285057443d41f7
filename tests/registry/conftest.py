"""A GALE_HOME of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(gale_home: Path) -> Path:
    gale_home.mkdir()
    return gale_home
