"""What docs/models.md tells to type works, and both languages tell the same."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from gale.core.recipe import load_recipe
from gale.train.recipe import ExpertsTable, PretrainRecipe
from tests.cli.conftest import Gale

ROOT = Path(__file__).parents[2]
PAGES = ("models.md", "models.zh.md")


def blocks(language: str, name: str) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.DOTALL | re.MULTILINE)


def test_both_languages_show_the_same_code() -> None:
    assert blocks("sh", PAGES[0]) == blocks("sh", PAGES[1])
    tables = [[line.split("#")[0] for line in blocks("toml", page)[0].splitlines()] for page in PAGES]
    assert tables[0] == tables[1]


def test_every_command_works_in_its_order(gale: Gale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    for line in (line for block in blocks("sh", "models.md") for line in block.splitlines()):
        words = shlex.split(line)
        assert words[0] == "gale"
        if words[1:3] == ["train", "pretrain"]:
            words += ["steps=2", "evaluate_every=2", "checkpoint_every=2"]
        result = gale(*words[1:])
        assert result.code == 0, f"{line}\n{result.err}"
    assert "2 of 8 a token" in result.out
    assert (tmp_path / "runs" / "heron-q8.gguf").stat().st_size < (tmp_path / "runs" / "heron.gguf").stat().st_size


def test_the_table_of_experts_is_that_of_the_recipe(tmp_path: Path) -> None:
    table = blocks("toml", "models.md")[0]
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    path = tmp_path / "recipes" / "smoke.toml"
    path.write_text(path.read_text() + "\n" + table)
    experts = load_recipe(path, PretrainRecipe, []).model.experts
    assert experts is not None
    assert set(ExpertsTable.model_fields) == set(re.findall(r"^(\w+) =", table, re.MULTILINE))
    defaults = {name: field.default for name, field in ExpertsTable.model_fields.items() if not field.is_required()}
    assert {name: getattr(experts, name) for name in defaults} == defaults
