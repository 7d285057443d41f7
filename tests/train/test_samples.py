"""Samples: they stand in the metrics, and a run with them is the run without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gale.core.errors import DataError
from gale.engine.rollouts import continue_texts
from gale.model.checkpoint import load_model
from gale.text.tokenizer import Tokenizer
from gale.train.grow import grow
from gale.train.pretrain import pretrain
from gale.train.recipe import GrowRecipe, RewardRecipe, SftRecipe
from gale.train.sft import sft
from tests.train.runs import metrics, recipe

WANTED: dict[str, Any] = {"sample_every": 2, "sample_prompts": ["The wind", "风"], "sample_tokens": 7}


def test_samples_stand_in_the_metrics_and_change_nothing(prepared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    pretrain(recipe(prepared), tmp_path / "plain")
    pretrain(recipe(prepared, **WANTED, export="fp32"), tmp_path / "sampled")
    rows = metrics(tmp_path / "sampled")
    samples = [row.pop("samples", None) for row in rows]
    assert rows == metrics(tmp_path / "plain")
    assert [sample is not None for sample in samples] == [False, True] * 3
    finished = load_model(tmp_path / "sampled" / "model", dtype=torch.float32)
    assert samples[-1] == continue_texts(finished, tokenizer, ["The wind", "风"], 7, chat=False)


def test_a_chat_model_answers_its_samples_as_turns(prepared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    pretrain(recipe(prepared, steps=2), tmp_path / "base")
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"})
    tuned = SftRecipe.model_validate(fields | WANTED | {"base": tmp_path / "base" / "model", "export": "fp32"})
    sft(tuned, tmp_path / "sft")
    finished = load_model(tmp_path / "sft" / "model", dtype=torch.float32)
    expected = continue_texts(finished, tokenizer, ["The wind", "风"], 7, chat=True)
    assert metrics(tmp_path / "sft")[-1]["samples"] == expected


def test_a_grown_model_goes_on_with_its_samples_as_documents(
    prepared: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    pretrain(recipe(prepared, steps=2), tmp_path / "base")
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"}) | WANTED | {"grow": {"layers": 2}}
    grow(GrowRecipe.model_validate(fields | {"base": tmp_path / "base" / "model", "export": "fp32"}), tmp_path / "grow")
    finished = load_model(tmp_path / "grow" / "model", dtype=torch.float32)
    expected = continue_texts(finished, tokenizer, ["The wind", "风"], 7, chat=False)
    assert metrics(tmp_path / "grow")[-1]["samples"] == expected


def test_samples_that_nobody_could_write_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none"):
        recipe(prepared, sample_every=2)
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"}) | {"base": tmp_path}
    with pytest.raises(ValueError, match="a reward model writes nothing"):
        RewardRecipe.model_validate(fields | WANTED)


def test_a_sample_that_will_not_fit_is_refused_before_training(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The sample prompt 'The wind' .* context of 48"):
        pretrain(recipe(prepared, **WANTED | {"sample_tokens": 46}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
