"""Log lines: nothing in them commands a terminal, and a log that cannot be written stops nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from gale.core.logging import configure_logging

HOSTILE = "a\x1b[2Jb\x07\u202ec\x9b31m"
HARMLESS = "a[2Jbc31m"


class Terminal(io.StringIO):
    """Says that it is one."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def write_all_kinds() -> None:
    log = structlog.get_logger()
    log.info("note", word=HOSTILE, path=["/", HOSTILE], inside={"deep": HOSTILE}, number=3)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("broke")


def test_what_a_line_quotes_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal(tty=True)
    monkeypatch.setattr("sys.stderr", shown)
    configure_logging()
    write_all_kinds()
    plain = shown.getvalue()
    for colour in ("0", "1", "2", "31", "32", "33", "35", "36"):  # those that the renderer itself puts in
        plain = plain.replace(f"\x1b[{colour}m", "")
    assert plain.count(HARMLESS) + plain.count(repr(HOSTILE)) == 4
    assert not set("\x1b\x07\u202e\x9b") & set(plain)
    assert "ValueError" in plain


def test_lines_for_programs_hold_no_commands_either(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal(tty=False)
    monkeypatch.setattr("sys.stderr", file)
    configure_logging()
    write_all_kinds()
    note, broke = map(json.loads, file.getvalue().splitlines())
    assert (note["word"], note["path"], note["inside"]) == (HARMLESS, ["/", HARMLESS], {"deep": HARMLESS})
    assert note["number"] == 3
    assert broke["exception"][0]["exc_value"] == HARMLESS
    assert "locals" not in file.getvalue()


@pytest.mark.parametrize("tty", [True, False])
def test_a_log_on_a_full_disk_stops_nothing(monkeypatch: pytest.MonkeyPatch, tty: bool) -> None:
    class Full(Terminal):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full(tty))
    configure_logging()
    write_all_kinds()
