"""Every shape a recipe can ask for trains, and what comes out opens in transformers with the logits it has here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gale.model.checkpoint import load_model
from gale.model.config import Experts
from gale.train.pretrain import pretrain
from tests.model.test_families import our_logits, their_logits
from tests.train.runs import metrics, recipe

SHAPE = recipe(Path("unused")).model.model_dump()
EXPERTS = {"count": 4, "per_token": 2, "intermediate_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "experts": {"experts": EXPERTS},
    "experts, untied": {"experts": EXPERTS, "tied_embeddings": False},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_trains_and_its_model_is_transformers_own(name: str, prepared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pretrain(recipe(prepared, model={**SHAPE, **SHAPES[name]}, export="fp32"), tmp_path / "run")
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]

    ours = load_model(tmp_path / "run" / "model", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tied = SHAPES[name].get("tied_embeddings", True)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is tied
    assert torch.equal(ours.lm_head.weight, ours.embed_tokens.weight) is tied
    ids = torch.arange(30)
    assert (our_logits(ours, ids) - their_logits(theirs, ids)).abs().max() < 1e-4


def test_the_experts_of_a_recipe_are_those_of_the_model(prepared: Path, tmp_path: Path) -> None:
    table = {**EXPERTS, "normalise": False, "balance_loss": 0.5, "z_loss": 0.25}
    pretrain(recipe(prepared, model={**SHAPE, "experts": table}, steps=1), tmp_path / "run")
    config = load_model(tmp_path / "run" / "model", dtype=torch.float32).config
    assert config.experts == Experts(4, 2, 16, normalise=False, balance_loss=0.5, z_loss=0.25)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"per_token \(5\) must not exceed count \(4\)"):
        recipe(Path("unused"), model={**SHAPE, "experts": {**EXPERTS, "per_token": 5}})
