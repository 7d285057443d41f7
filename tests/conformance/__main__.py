"""``python -m tests.conformance``: writes ``docs/conformance.md``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import structlog

from tests.conformance.live import compared
from tests.conformance.report import markdown

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[])
    with tempfile.TemporaryDirectory() as folder, compared(Path(folder)) as (checker, parameters):
        PAGE.write_text(markdown(checker, parameters))
    print(PAGE)
