"""Running ``gale`` in this process, through its real entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gale.cli.main import main


class Result:
    """How a command ended and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Gale = Callable[..., Result]


@pytest.fixture
def gale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gale_home: Path) -> Gale:
    """Run ``gale`` through its real entry point."""

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["gale", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run
