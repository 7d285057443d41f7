"""Every recipe on the page about post-training can be used as it stands, in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gale.core.recipe import Recipe, load_recipe
from gale.data.recipe import DataRecipe
from gale.train.recipe import DpoRecipe, RewardRecipe, SftRecipe

DOCS = Path(__file__).parents[2] / "docs"
KINDS: dict[str, type[Recipe]] = {
    "sft.toml": SftRecipe,
    "sft-lora.toml": SftRecipe,
    "preferences.toml": DataRecipe,
    "reward.toml": RewardRecipe,
    "dpo.toml": DpoRecipe,
}


@pytest.mark.parametrize("page", ["post-training.md", "post-training.zh.md"])
def test_the_recipes_of_the_page_are_valid(tmp_path: Path, page: str) -> None:
    blocks = re.findall(r"```toml\n# (\S+)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert {name for name, _ in blocks} >= KINDS.keys()
    for name, content in blocks:
        if name in KINDS:  # other stages look after their own
            (tmp_path / name).write_text(content, encoding="utf-8")
            load_recipe(tmp_path / name, KINDS[name])
