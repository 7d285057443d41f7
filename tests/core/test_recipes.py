"""Recipes: every fault is reported at once, with the nearest valid name; paths are found from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from gale.core.errors import RecipeError
from gale.core.recipe import load_recipe
from gale.data.recipe import DataRecipe
from gale.train.recipe import PretrainRecipe

GOOD = """
data = "prepared"
steps = 10
batch_rows = 4
micro_rows = 2
row_tokens = 64
[model]
hidden_size = 64
intermediate_size = 128
layers = 2
heads = 4
kv_heads = 2
context_length = 128
[optimiser]
learning_rate = 1e-3
"""
SOURCES = """
tokenizer = "tok"
[[sources]]
path = "a.jsonl"
licence = "CC0"
origin = "us"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, kind: type = PretrainRecipe, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, kind, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_a_good_recipe_is_read_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD), PretrainRecipe)
    assert recipe.data == tmp_path / "prepared"
    assert recipe.optimiser.beta2 == 0.95


def test_overrides_reach_into_tables_and_count_as_toml(tmp_path: Path) -> None:
    overrides = ["steps=20", "optimiser.schedule=cosine", "optimiser.learning_rate=2e-3", "compile=true"]
    recipe = load_recipe(written(tmp_path, GOOD), PretrainRecipe, overrides)
    assert (recipe.steps, recipe.optimiser.schedule, recipe.optimiser.learning_rate) == (20, "cosine", 2e-3)
    assert recipe.compile is True


def test_a_path_in_an_override_counts_from_where_the_person_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe(written(tmp_path, GOOD), PretrainRecipe, ["data=mine"]).data == tmp_path / "here" / "mine"
    table = '{path = "b.jsonl", licence = "CC0", origin = "us", format = "text", only = ["x"]}'
    recipe = load_recipe(written(tmp_path, SOURCES), DataRecipe, [f"sources=[{table}]", 'replace={a = "b"}'])
    assert recipe.tokenizer == tmp_path / "tok"
    assert recipe.sources[0].path == tmp_path / "here" / "b.jsonl"
    assert type(recipe.sources[0].origin) is type(recipe.sources[0].only[0]) is type(recipe.replace["a"]) is str


def test_all_faults_are_reported_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    text = GOOD.replace("steps = 10", 'stepz = 10\nprecision = "fp8"').replace("layers = 2", "layerz = 0")
    found = problems(written(tmp_path, text), overrides=("optimiser.learning_rte=1", "nonsense", "steps.x=1"))
    expected = [
        "override 'nonsense': write key=value",
        "stepz: no such key; did you mean 'steps'?",
        "model.layerz: no such key; did you mean 'layers'?",
        "model.layers: required, but missing",
        "optimiser.learning_rte: no such key; did you mean 'learning_rate'?",
        "precision: input should be 'auto', 'bf16' or 'fp32', not 'fp8'",
    ]
    assert set(expected) <= set(found)


def test_faults_in_a_list_of_tables_say_which_one(tmp_path: Path) -> None:
    text = SOURCES + SOURCES[SOURCES.index("[[") :].replace("licence", "lisence").replace('"us"', "3")
    found = problems(written(tmp_path, text + "epochs = 0\n"), DataRecipe)
    assert "sources.2.lisence: no such key; did you mean 'licence'?" in found
    assert "sources.2.licence: required, but missing" in found
    assert "sources.2.origin: input should be a valid string, not 3" in found
    assert any(problem.startswith("sources.2.epochs: input should be greater than 0") for problem in found)


def test_a_key_that_resembles_nothing_gets_the_list_of_valid_ones(tmp_path: Path) -> None:
    (found,) = problems(written(tmp_path, SOURCES + "\nzzzzz = 1\n"), DataRecipe)
    assert "sources.1.zzzzz: no such key (valid: encoding, epochs, fields, format, kind, licence," in found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("steps = 10", "steps = 10.5"), "steps: input should be a valid integer"),
        (("steps = 10", 'steps = "10"'), "steps: input should be a valid integer"),
        (("steps = 10", "steps = true"), "steps: input should be a valid integer"),
        (("steps = 10", "steps = 0"), "steps: input should be greater than or equal to 1"),
        (("1e-3", "nan"), "optimiser.learning_rate"),
        (("1e-3", "inf"), "optimiser.learning_rate"),
        (("1e-3", "-1.0"), "optimiser.learning_rate: input should be greater than 0"),
        (("micro_rows = 2", "micro_rows = 3"), "batch_rows (4) must be a multiple of micro_rows (3)"),
        (("kv_heads = 2", "kv_heads = 3"), "model: heads (4) must be a multiple of kv_heads (3)"),
        (("hidden_size = 64", "hidden_size = 60"), "model.hidden_size: input should be a multiple of 8, not 60"),
        (('"prepared"', '"~nobody-at-all/x"'), "data: ~nobody-at-all/x cannot be followed"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    (found,) = problems(written(tmp_path, GOOD.replace(*change)))
    assert found.startswith(says), found


@pytest.mark.parametrize(
    ("questions", "says"),
    [
        ('prompts = ["{context}"]', "must hold {context} and {question}"),
        ('prompts = ["{context} {question} {other}"]', "must hold no other braces"),
        ('prompts = ["{context} {question} {"]', "must hold no other braces"),
        ('prompts = ["{context} {question}"]\ngrounded = 0.9', "must sum to 1"),
        ('prompts = ["{context} {question}"]\ncontext_characters = [9, 3]', "smaller and a larger"),
    ],
)
def test_question_templates_are_checked(tmp_path: Path, questions: str, says: str) -> None:
    text = (
        f'{SOURCES}format = "qa"\n[sources.questions]\nunanswerable_reply = "a"\nclosed_book_reply = "b"\n{questions}\n'
    )
    assert any(says in problem for problem in problems(written(tmp_path, text), DataRecipe))


@pytest.mark.parametrize("content", [b"a = [", b"\xff\xfe", None])
def test_a_recipe_that_cannot_be_read_is_a_message(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        load_recipe(path, PretrainRecipe)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path, PretrainRecipe)
