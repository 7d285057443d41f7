"""docs/data.md: its recipe is the one in recipes/smoke, runs, and does what the page says of each step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gale.core.recipe import load_recipe
from gale.data.cleaning_recipe import Step
from gale.data.prepare import prepare
from gale.data.recipe import FORMAT_KEYS, DataRecipe, Source

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smoke" / "data-clean.toml"


@pytest.mark.parametrize("page", ["data.md", "data.zh.md"])
def test_the_page_shows_the_recipe_and_names_every_step_and_key_of_a_source(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    shown = re.search(r"<!-- recipe -->\n```toml\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == RECIPE.read_text(encoding="utf-8")
    for step in Step.__args__:
        assert f"`[{step}]`" in text
    for key in (*Source.model_fields.keys() - {"licence", "origin"}, *FORMAT_KEYS):
        assert re.search(rf"`{key}`", text), key


def test_every_step_of_the_recipe_has_something_to_do(gale_home: Path, tmp_path: Path) -> None:
    manifest = prepare(load_recipe(RECIPE, DataRecipe), tmp_path / "out")
    held, english, chinese, notes = manifest["sources"]
    assert held["documents"] == 12
    assert notes["dropped"] == {"unpunctuated_lines": 1, "other_language": 1, "contaminated": 1}
    assert (notes["near_duplicates"], notes["broken_lines"]) == (1, 1)
    assert notes["redacted"] == {"email": 3, "phone": 3}
    train = manifest["splits"]["train"]["tokens"]
    for source, share in ((english, 4 / 6), (chinese, 1 / 6), (notes, 1 / 6)):
        assert source["tokens"] / train == pytest.approx(share, abs=0.05)
    assert english["kept"] + chinese["kept"] > 195  # good text stays
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"manifest.json", "report.html", "dropped.jsonl"}
