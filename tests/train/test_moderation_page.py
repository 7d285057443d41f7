"""Every recipe on the page about moderation, and those of the classifier that Gale comes with, can be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gale.core.recipe import Recipe, load_recipe
from gale.evals.recipe import EvalRecipe
from gale.train.labelled import LabelledData
from gale.train.recipe import ClassifierRecipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["moderation.md", "moderation.zh.md"])
def test_the_recipes_of_the_page_are_valid(tmp_path: Path, page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", text, re.DOTALL))
    kinds: dict[str, type[Recipe]] = {"mail-data.toml": LabelledData, "mail.toml": ClassifierRecipe}
    assert blocks.keys() == kinds.keys()
    for name, content in blocks.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        load_recipe(tmp_path / name, kinds[name])


def test_what_is_reported_on_is_not_trained_on() -> None:
    folder = ROOT / "recipes/moderation"
    data = load_recipe(load_recipe(folder / "classifier.toml", ClassifierRecipe).data, LabelledData)
    reported = {task.path for task in load_recipe(folder / "eval.toml", EvalRecipe).tasks}
    assert reported == set(data.leave_out)
    assert not reported & {source.path for source in data.sources}
    assert all(path.name in ("cold_dev.jsonl.gz", "tweets_val.jsonl.gz") for path in reported)
