"""``gale data`` and ``gale train`` from the command line: bad input ends in a message, never in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Gale

RECIPES = Path(__file__).parents[2] / "recipes"
SOURCE = '[[sources]]\npath = "texts.jsonl"\nlicence = "CC0"\norigin = "us"\n'


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a small text and the recipes that read it."""
    texts = [f"Sentence number {i} speaks of the sea. 第{i}句话说的是大海。" for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "tokenizer.toml").write_text("vocabulary_size = 310\n" + SOURCE)
    (tmp_path / "data.toml").write_text('tokenizer = "tok"\n' + SOURCE)
    (tmp_path / "train.toml").write_text(
        'data = "prepared"\nsteps = 3\nbatch_rows = 2\nmicro_rows = 2\nrow_tokens = 32\n'
        "[model]\nhidden_size = 16\nintermediate_size = 24\nlayers = 1\nheads = 2\nkv_heads = 1\nhead_dim = 8\n"
        "context_length = 32\n[optimiser]\nlearning_rate = 0.01\n"
    )
    return tmp_path


def test_from_text_to_a_model_one_command_after_another(gale: Gale, workplace: Path) -> None:
    result = gale("train", "tokenizer", workplace / "tokenizer.toml", "--out", workplace / "tok")
    assert result.code == 0
    assert "310 tokens" in result.out
    result = gale("data", "prepare", workplace / "data.toml", "--out", workplace / "prepared")
    assert result.code == 0
    assert "train: 60 documents" in result.out
    result = gale("train", "pretrain", workplace / "train.toml", "--out", workplace / "run")
    assert result.code == 0
    assert "final loss" in result.out
    assert (workplace / "run/model/model.safetensors").is_file()
    result = gale("train", "pretrain", workplace / "train.toml", "--out", workplace / "run")
    assert result.code == 1
    assert "already holds a run" in result.err
    assert gale("train", "pretrain", workplace / "train.toml", "--out", workplace / "run", "--resume").code == 0
    (workplace / "run/metrics.jsonl").unlink()
    result = gale("train", "pretrain", workplace / "train.toml", "--out", workplace / "run", "--resume")
    assert result.code == 0
    assert "metrics.jsonl is gone" in result.out


def test_a_dry_run_prints_the_whole_recipe_and_writes_nothing(gale: Gale, workplace: Path, gale_home: Path) -> None:
    before = sorted(workplace.iterdir())
    result = gale("train", "pretrain", workplace / "train.toml", "steps=7", "--dry-run")
    assert result.code == 0
    recipe = json.loads(result.out)
    assert (recipe["steps"], recipe["optimiser"]["beta1"]) == (7, 0.9)
    assert sorted(workplace.iterdir()) == before
    assert not gale_home.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "pretrain", "nowhere.toml"], 2, "There is no recipe"),
        (["train", "pretrain", "train.toml", "stepz=3", "model.heads=x"], 2, "did you mean 'steps'"),
        (["train", "pretrain", "train.toml"], 1, "holds no prepared data"),
        (["train", "pretrain", "train.toml", "--resume"], 2, "give --out"),
        (["train", "pretrain", "train.toml", "data=data.toml"], 1, "There is no"),
        (["train", "sft", "train.toml"], 2, "base: required, but missing"),
        (["train", "tokenizer", "tokenizer.toml", "vocabulary_size=3"], 2, "vocabulary_size"),
        (["data", "prepare", "data.toml"], 1, "no tokenizer.json"),
        (
            ["data", "prepare", "data.toml", "tokenizer=tokenizer.toml", "--out", "texts.jsonl"],
            1,
            "stands in its place",
        ),
        (["data", "prepare", "data.toml", "tokenizer=tokenizer.toml", "--out", "."], 1, "not replaced"),
        (["train", "tokenizer", "tokenizer.toml", "--out", "~nobody-at-all/x"], 1, "no such home folder"),
        (["train", "fly"], 2, "fly"),
    ],
)
def test_bad_input_ends_in_a_message(
    gale: Gale, workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(workplace)
    before = sorted(workplace.glob("*"))
    result = gale(*arguments)
    assert result.code == code, result.err
    assert says in result.err
    assert [path for path in sorted(workplace.glob("*")) if path.name != "gale-home"] == before


def test_square_brackets_in_a_message_survive(gale: Gale, tmp_path: Path) -> None:
    assert "[/bold]recipe[red].toml" in gale("train", "pretrain", f"{tmp_path}/[/bold]recipe[red].toml").err


@pytest.mark.parametrize(
    ("verb", "recipe"),
    [
        ("train tokenizer", "builtin/tokenizer.toml"),
        ("data prepare", "builtin/pretrain-data.toml"),
        ("train pretrain", "builtin/pretrain.toml"),
        ("data prepare", "builtin/sft-data.toml"),
        ("train sft", "builtin/sft.toml"),
        ("train pretrain", "smoke.toml"),
        ("train rl", "smoke-rl.toml"),
        ("data prepare", "smoke/data.toml"),
        ("train tokenizer", "smoke/tokenizer.toml"),
    ],
)
def test_the_recipes_that_come_with_gale_are_valid(gale: Gale, verb: str, recipe: str) -> None:
    assert gale(*verb.split(), RECIPES / recipe, "--dry-run").code == 0


def test_a_model_learns_from_its_own_answers(gale: Gale, workplace: Path) -> None:
    (workplace / "prompts.jsonl").write_text('{"prompt": "Sentence number", "expected": "sea"}\n' * 2)
    (workplace / "rl.toml").write_text(
        'algorithm = "grpo"\nbase = "run/model"\ndata = "prompts.jsonl"\nsteps = 2\nbatch_rows = 4\nmicro_rows = 4\n'
        "row_tokens = 32\nanswer_tokens = 8\nanswers_per_prompt = 4\n"
        '[reward]\nverifier = "f1"\n[optimiser]\nlearning_rate = 0.001\n'
    )
    (workplace / "best.toml").write_text(
        'base = "run/model"\ndata = "prompts.jsonl"\nn = 4\nanswer_tokens = 8\n[reward]\nverifier = "f1"\n'
    )
    data = f"tokenizer={workplace / 'tokenizer.toml'}"
    assert gale("data", "prepare", workplace / "data.toml", data, "--out", workplace / "prepared").code == 0
    assert gale("train", "pretrain", workplace / "train.toml", "--out", workplace / "run").code == 0
    result = gale("train", "rl", workplace / "rl.toml", "--out", workplace / "rl")
    assert result.code == 0, result.err
    assert "reward of the last answers" in result.out
    assert (workplace / "rl/model/model.safetensors").is_file()
    result = gale("train", "best-of-n", workplace / "best.toml", "--out", workplace / "best")
    assert result.code == 0, result.err
    assert "best of 4: reward" in result.out
    assert "2 of 2 answers kept" in result.out
    result = gale("train", "rl", workplace / "rl.toml", "reward.verifier=taste", "--out", workplace / "other")
    assert result.code == 2
    assert "There is no verifier 'taste'; there are choice" in result.err
