"""What the README tells a newcomer to type works, and both READMEs tell the same."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Served

ROOT = Path(__file__).parents[2]
VENV = ".venv/bin/"
PAGES = [page.relative_to(ROOT) for page in (ROOT / "docs").glob("*.md")]


def blocks(language: str, name: str = "README.md") -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)


def test_both_languages_show_the_same_code() -> None:
    pairs = [("README.md", "README.zh.md")]
    pairs += [(str(page).replace(".zh.md", ".md"), str(page)) for page in PAGES if page.name.endswith(".zh.md")]
    for language in ("sh", "python", "toml"):
        for english, chinese in pairs:
            # Comments are text for people and may be translated.
            first, second = ([re.sub(r" *#.*", "", b) for b in blocks(language, page)] for page in (english, chinese))
            assert first == second, english
    assert blocks("sh")[0].splitlines()[-1] == "make run"


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)#]+)", page.read_text())


def test_both_languages_say_what_is_promised_of_security_with_the_same_tests() -> None:
    english, chinese = (ROOT / name for name in ("SECURITY.md", "SECURITY.zh.md"))
    first, second = ([link for link in links_of(page) if link.startswith("tests/")] for page in (english, chinese))
    assert first == second != []
    points = [re.findall(r"^- ", page.read_text(), re.MULTILINE) for page in (english, chinese)]
    assert len(points[0]) == len(points[1])


PLAIN = ["README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md", "SECURITY.zh.md"]


@pytest.mark.parametrize("name", [*PLAIN, *sorted(map(str, PAGES))])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = links_of(page)
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_make_run_serves_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    if not (ROOT / VENV / "gale").exists():
        pytest.skip("not in a checkout with a .venv")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["make", "run", "ARGS=--port 0"],
            cwd=ROOT,
            env={**os.environ, "GALE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        ready = next((line for line in lines if "ready at" in line), "")
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        code = process.wait(timeout=30)
    assert code in (0, -signal.SIGINT, 128 + signal.SIGINT)  # make itself answers Ctrl-C with its signal
    # The stamps of `make test` are there, so this was a second start: nothing is installed or built again.
    assert "Installing" not in ready and "Building" not in ready
    assert "http://127.0.0.1:" in ready, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_gale_commands_from_beginning_to_end(name: str, tmp_path: Path) -> None:
    """Every `gale` command of a page in its order, with fewer steps, in a copy of the recipes."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    environment = {**os.environ, "GALE_HOME": str(tmp_path / "home")}
    lines = [line.removeprefix(VENV) for block in blocks("sh", name) for line in block.splitlines()]
    for line in (line for line in lines if line.startswith("gale ")):
        words = shlex.split(line.removeprefix("gale "))
        if words[:2] in (["train", "pretrain"], ["train", "sft"]) and "--dry-run" not in words:
            # The whole run has its own test; here a few steps show that the line is right.
            words += ["steps=4", "evaluate_every=2", "checkpoint_every=2"]
        command = [sys.executable, "-m", "gale.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip()
    assert (tmp_path / "runs/smoke-chat/curves.svg").is_file()


def test_the_python_example_streams(served: Served, tmp_path: Path) -> None:
    (code,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(code.replace("http://127.0.0.1:8000", served.url))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
