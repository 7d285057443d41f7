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


def gale_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith(VENV)]


def test_both_languages_show_the_same_code() -> None:
    for language in ("sh", "python"):
        assert blocks(language) == blocks(language, "README.zh.md")
        assert blocks(language, "docs/tutorial.md") == blocks(language, "docs/tutorial.zh.md")
    assert blocks("sh")[0].splitlines()[-1] == "make run"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", "CONTRIBUTING.md", *sorted(map(str, PAGES))])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
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
        process.wait(timeout=30)
    assert "http://127.0.0.1:" in ready, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("line", gale_lines())
def test_gale_commands(line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gale.cli", *shlex.split(line.removeprefix(VENV + "gale "))]
    if "pretrain" in command:
        # The whole run has its own test; here a few steps show that the line is right.
        command = [word if word != "runs/smoke" else str(tmp_path / "smoke") for word in command]
        command += ["steps=3", "evaluate_every=3"]
    if "runs/smoke/model" in command:
        command = [word if word != "runs/smoke/model" else "gale-0" for word in command]
    environment = {**os.environ, "GALE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_tutorial_from_beginning_to_end(tmp_path: Path) -> None:
    """Every command of the tutorial in its order, with fewer steps, in a copy of the recipes."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    environment = {**os.environ, "GALE_HOME": str(tmp_path / "home")}
    for block in blocks("sh", "docs/tutorial.md")[1:]:
        (line,) = block.splitlines()
        words = shlex.split(line.removeprefix("gale "))
        if words[:2] in (["train", "pretrain"], ["train", "sft"]) and "--dry-run" not in words:
            words += ["steps=4", "evaluate_every=2", "checkpoint_every=2"]
        command = [sys.executable, "-m", "gale.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "runs/smoke-chat/curves.svg").is_file()


def test_the_python_example_streams(served: Served, tmp_path: Path) -> None:
    (code,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(code.replace("http://127.0.0.1:8000", served.url))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
