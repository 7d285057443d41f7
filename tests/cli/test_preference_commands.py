"""From principles to a chat model that follows them, one command after another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gale.cli.main import app
from gale.model.checkpoint import load_model, save_model
from gale.model.reward_model import load_reward_model
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import make_model

CONSTITUTION = """
max_tokens = 6
[prompts.en]
critique = "{prompt} {answer} {principle}"
revision = "{prompt} {answer} {principle} {critique}"
comparison = "{prompt} {a} {b} {principle}"
[[principles]]
name = "kind"
text = "Be kind."
"""
DATA = """
tokenizer = "base"
[[sources]]
path = "pairs.jsonl"
format = "preference"
licence = "CC0"
origin = "us"
"""
STAGE = """
base = "base"
data = "data.toml"
steps = 2
batch_rows = 2
micro_rows = 2
row_tokens = 64
precision = "fp32"
[optimiser]
learning_rate = 1e-3
"""


def gale(*arguments: str | Path) -> str:
    """What ``gale`` printed; it must have succeeded."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("gale_home")
def test_from_principles_to_models(tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(make_model(tokenizer), base, dtype=torch.float32)
    tokenizer.save(base)
    for name, text in (("principles", CONSTITUTION), ("data", DATA), ("stage", STAGE)):
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "prompts.txt").write_text("Where?\nWhy?\nWhen?\n")

    pairs = tmp_path / "pairs.jsonl"
    principles, prompts = tmp_path / "principles.toml", tmp_path / "prompts.txt"
    said = gale("data", "constitution", principles, "--model", base, "--prompts", prompts, "--out", pairs)
    assert "prompts: 3" in said
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert rows
    assert {row["principle"] for row in rows} == {"kind"}

    stage = tmp_path / "stage.toml"
    gale("train", "reward", stage, "--out", tmp_path / "reward")
    load_reward_model(tmp_path / "reward/model", dtype=torch.float32)
    said = gale("train", "dpo", stage, "lora.rank=4", "--out", tmp_path / "dpo")
    assert "Model written to" in said
    gale("train", "merge", tmp_path / "dpo/model", "--base", base, "--out", tmp_path / "merged", "--fp32")
    load_model(tmp_path / "merged", dtype=torch.float32)
