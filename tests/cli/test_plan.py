"""``gale plan`` and ``gale train report`` from the command line, and every command of docs/planning.md."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gale.cli.main import main
from gale.registry.models import BUILTIN

ROOT = Path(__file__).parents[2]
Gale = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gale_home: Path) -> Gale:
    """Run ``gale`` through its real entry point; code, output and errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gale", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_a_plan_prints_its_figures_with_reasons(gale: Gale) -> None:
    code, out, _ = gale("plan", "--parameters", "7e9", "--devices", "64", "--device", "a100", "--tokens", "2e12")
    assert code == 0
    for words in ("A100's peak", "GiB a device", "days", "kWh", "Kaplan", "ZeRO", "rent"):
        assert words in out, words


def test_a_plan_as_json_is_for_programs(gale: Gale) -> None:
    code, out, _ = gale("plan", ROOT / "recipes/smoke.toml", "--devices", "1", "--json", "--price", "2", "--mfu", "0.1")
    assert code == 0
    made = json.loads(out)
    assert made["tokens"] == 204_800
    assert made["model"]["vocabulary"] == 1200
    assert made["device"]["utilisation"] == 0.1
    assert made["rent"] == pytest.approx(2 * made["device_hours"])
    assert made["layout"]["memory"]["total"] > 18 * made["model"]["parameters"]


def test_a_model_folder_can_be_planned(gale: Gale) -> None:
    if not (BUILTIN / "config.json").is_file():
        pytest.skip("the built-in model is not here")
    code, out, _ = gale("plan", BUILTIN, "--device", "rtx-4090", "--devices", "1")
    assert code == 0
    assert "5.77M parameters" in out


def test_what_cannot_be_planned_is_a_message(gale: Gale, tmp_path: Path) -> None:
    assert "Say which model" in gale("plan")[2]
    assert "Say which model" in gale("plan", "x", "--parameters", "7e9")[2]
    assert "no device" in gale("plan", "--parameters", "7e9", "--device", "abacus")[2]
    assert "no config.json" in gale("plan", tmp_path)[2]
    assert "h200" in gale("plan", "--devices-known")[1]


def test_a_report_is_made_from_metrics_alone(gale: Gale, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.5}\n{"step": 2, "to')
    code, out, _ = gale("train", "report", tmp_path, "--tensorboard")
    assert code == 0
    assert str(tmp_path / "report.html") in out
    assert "2.5000" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    code, _, err = gale("train", "report", tmp_path / "nowhere")
    assert code == 1
    assert "holds no metrics.jsonl" in err


@pytest.mark.parametrize("page", ["planning.md", "planning.zh.md"])
def test_the_commands_of_the_documentation_run(page: str, gale: Gale, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("gale ")]
    assert len(commands) >= 6
    monkeypatch.chdir(ROOT)
    for command in commands:
        if "--out" in command or command.startswith("gale train report"):
            continue  # what trains is covered by tests/train
        code, out, err = gale(*shlex.split(command)[1:])
        assert code == 0, (command, out, err)


def test_the_two_languages_show_the_same_commands() -> None:
    pages = [(ROOT / "docs" / name).read_text() for name in ("planning.md", "planning.zh.md")]
    english, chinese = (re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for page in pages)
    assert english == chinese


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--parameters", "inf"),
        ("--parameters", "1e30"),
        ("--tokens", "inf"),
        ("--hidden", "-3"),
        ("--vocabulary", "0"),
        ("--watts", "-5"),
        ("--price", "nan"),
        ("--electricity", "-1"),
        ("--devices", "0"),
    ],
)
def test_figures_that_no_run_has_are_named(gale: Gale, option: str, value: str) -> None:
    code, _, errors = gale("plan", "--parameters", "7e9", option, value)
    assert code == 1
    assert option in errors
    assert gale("plan", "--parameters", "7e9", "--layers", "1000000000000")[0] == 2
