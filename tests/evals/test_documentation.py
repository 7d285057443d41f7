"""What docs/evaluation.md tells people to type works, with the files that it shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gale.registry.models import BUILTIN

PAGE = Path(__file__).parents[2] / "docs/evaluation.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's files in it."""
    (tmp_path / "quiz.jsonl").write_text(blocks("json")[0])
    (tmp_path / "quiz.toml").write_text(blocks("toml")[0])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/quiz.yaml").write_text(blocks("yaml")[0])
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    # Without kernels, which round elsewhere, so that the figures agree exactly as the page says.
    own = {"GALE_HOME": str(folder / "home"), "GALE_KERNELS": "off", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **offline, **own}


def commands(program: str) -> list[list[str]]:
    return [line.split()[1:] for block in blocks("sh") for line in block.splitlines() if line.startswith(program)]


@pytest.mark.slow
def test_the_page_s_commands_run_and_the_harness_finds_the_same(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    gale = [sys.executable, "-m", "gale.cli"]
    for words in commands("gale "):
        done = subprocess.run([*gale, *words], cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| chance |" in done.stdout
    report = json.loads((folder / "runs/quiz/report.json").read_text())
    assert (folder / "runs/quiz/report.html").is_file()
    ours = {row["metric"]: row["value"] for row in report["scores"] if row["task"] == "quiz"}
    (words,) = commands("lm_eval ")
    assert shutil.which("lm_eval", path=str(Path(sys.executable).parent)), "the command is there with the package"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*gale, "serve", "--port", "0"],
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert server.stdout is not None
        ready = next(line for line in iter(server.stdout.readline, "") if "ready at" in line)
        url = re.search(r"http://[\d.:]+", ready)
        assert url is not None
        filled = [word.replace("http://127.0.0.1:8000", url[0]).replace("$MODEL", str(BUILTIN)) for word in words]
        done = subprocess.run(
            [Path(sys.executable).parent / "lm_eval", *filled, "--output_path", "harness"],
            cwd=folder,
            env=environment(folder),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
    (found,) = (folder / "harness").rglob("results_*.json")
    theirs = json.loads(found.read_text())["results"]["quiz"]
    assert {metric: round(theirs[f"{metric},none"], 4) for metric in ("acc", "acc_norm")} == {
        metric: ours[metric] for metric in ("acc", "acc_norm")
    }
