"""What docs/engines.md tells to type is what ``gale serve`` takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from gale.cli.main import app

PAGE = Path(__file__).parents[2] / "docs/engines.md"
LINES = [line for line in PAGE.read_text().splitlines() if line.startswith("gale serve")]


@pytest.mark.parametrize("line", LINES)
def test_its_commands_are_understood(line: str) -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert serve.make_context("serve", shlex.split(line)[2:])


def test_it_names_every_option_of_upstreams_and_replicas() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {option for parameter in serve.params for option in parameter.opts}
    named = set(re.findall(r"--[a-z-]+", PAGE.read_text())) | {"--model"}
    assert {option for option in options if re.match("--(upstream|ray|replica)", option)} <= named <= options
