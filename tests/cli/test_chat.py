"""`gale chat` as a person uses it, on a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gale.core.printable import printable
from gale.model.checkpoint import save_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer

GALE_CHAT = [sys.executable, "-m", "gale.cli", "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Decoder, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny[red]"
    save_model(model, folder, dtype=torch.float32)
    tokenizer.save(folder)
    return folder


class Terminal:
    """`gale chat` on a pseudo-terminal."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*GALE_CHAT, "--model", folder, "--temperature", "0", *options],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, wanted: str) -> str:
        """What came since the last call, up to and with ``wanted``."""
        while wanted not in self.text:
            ready, _, _ = select.select([self.master], [], [], 60)
            assert ready, f"nothing more came after {self.text!r}"
            self.text += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(wanted)
        return before


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    terminal = Terminal(folder, "--max-tokens", "600")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


def test_a_conversation_that_is_stopped_and_started_over(terminal: Terminal) -> None:
    terminal.read_until("tiny[red]")
    terminal.read_until("> ")
    terminal.type("Where does the river go?\n")
    terminal.read_until("go?")
    # Stopped in the middle of an answer, it asks again instead of leaving.
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until("> ")
    terminal.type("/new\n")
    terminal.read_until("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=30) == 0


def ask(folder: Path, *words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [*GALE_CHAT, "--model", folder, "--temperature", "0", "--max-tokens", "8", *words]
    return subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_one_question_and_piped_questions(folder: Path) -> None:
    once = ask(folder, "The sea?")
    piped = ask(folder, input=b"The sea?\n/new\nThe sea?\n")
    assert once.returncode == piped.returncode == 0
    assert once.stdout.strip()
    assert piped.stdout == once.stdout * 2


def test_a_program_learns_that_its_input_was_bad(folder: Path) -> None:
    done = ask(folder, input=b"\xff\xfe\n", env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 1
    assert b"not valid UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


def test_what_a_model_writes_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\u202ec\n\t好👩\u200d🚀") == "a[2Jbc\n\t好👩\u200d🚀"
