"""A classifier learns to tell labels from rows that nobody reports on; a resumed run ends in the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.core.errors import DataError, RecipeError
from gale.core.recipe import load_recipe
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model
from gale.model.classifier import load_classifier
from gale.model.reward_model import RewardModel
from gale.text.tokenizer import Tokenizer
from gale.train.classifier import Labelling, classifier, classifier_stage
from gale.train.labelled import LabelledData, LabelledRows, read_labelled
from gale.train.recipe import ClassifierRecipe
from tests.tiny_data import write_jsonl
from tests.train.preferences import recipe as stage_recipe
from tests.train.preferences import save_base
from tests.train.runs import metrics

WET = ["river", "sea", "大海", "河流"]
DRY = ["hill", "door", "山", "门"]


def rows(count: int) -> list[dict[str, Any]]:
    """Half of them say water."""
    frames = ["The {} and number {}.", "Where is the {} of {}?", "{} 在 {}"]
    return [
        {"text": frames[n % 3].format((WET if n % 2 else DRY)[n // 2 % 4], n), "label": n % 2, "kind": f"k{n % 5}"}
        for n in range(count)
    ]


def source(path: Path, **changes: Any) -> dict[str, Any]:
    rules = {"wet": {"key": "label", "values": [1]}, "fifth": {"key": "kind", "values": ["k4"]}}
    return {"name": "water", "path": str(path), "licence": "CC0", "origin": "us", "labels": rules, **changes}


def data(folder: Path, *sources: dict[str, Any], **changes: Any) -> LabelledData:
    fields = {"labels": ["wet", "fifth"], "sources": list(sources), "calibration_share": 0.2, "validation_share": 0.2}
    return LabelledData.model_validate({**fields, **changes}, context={"folder": folder})


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tokenizer, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A data recipe of one source, as a file."""
    write_jsonl(tmp_path / "rows.jsonl", rows(150))
    path = tmp_path / "data.toml"
    path.write_text(
        'labels = ["wet"]\ncalibration_share = 0.2\nvalidation_share = 0.2\n'
        '[[sources]]\nname = "water"\npath = "rows.jsonl"\nlicence = "CC0"\norigin = "us"\n'
        'labels = { wet = { key = "label", values = [1] } }\n'
    )
    return path


def recipe(toml: Path, base: Path, **changes: Any) -> ClassifierRecipe:
    return stage_recipe(ClassifierRecipe, toml, base, row_tokens=40, **changes)


def test_it_learns_to_tell_what_it_was_shown(toml: Path, base: Path, tmp_path: Path) -> None:
    optimiser = {"learning_rate": 0.01, "warmup_steps": 5}
    wanted = recipe(
        toml, base, steps=60, batch_rows=16, micro_rows=8, evaluate_every=60, checkpoint_every=60, optimiser=optimiser
    )
    final = classifier(wanted, tmp_path / "run")["final"]
    assert final["held_out"]["water_wet_accuracy"] > 0.9
    found = load_classifier(tmp_path / "run/model", dtype=torch.float32)
    wet, dry = found.probabilities(["The sea and number 400.", "The door and number 401."])
    assert dry["wet"] < 0.3 < 0.7 < wet["wet"]
    report = json.loads((tmp_path / "run/model/calibration.json").read_text())["wet"]
    assert report["calibration_rows"] > 10
    assert 0 <= report["error_after"] < 0.3


def test_a_resumed_run_ends_in_the_same_bits(toml: Path, base: Path, tmp_path: Path) -> None:
    classifier(recipe(toml, base), tmp_path / "whole")
    classifier(recipe(toml, base), tmp_path / "resumed")
    for checkpoint in (tmp_path / "resumed/checkpoints").iterdir():
        if checkpoint.name.endswith("6"):
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    classifier(recipe(toml, base), tmp_path / "resumed", resume=True)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    for name in ("model.safetensors", "classifier.json"):
        assert (tmp_path / "resumed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()


def plain_logits(model: RewardModel, ids: Tensor) -> Tensor:
    """What the head says at the end of one text that stands alone."""
    values = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))
    return values.view(len(ids), -1)[-1]


def test_the_loss_is_the_cross_entropy_of_what_is_known(tokenizer: Tokenizer, base: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(60))
    some = write_jsonl(tmp_path / "some.jsonl", [{"text": f"Nothing of the door, {n}."} for n in range(40)])
    known = source(some, name="half", labels={"fifth": False})
    parts = read_labelled(data(tmp_path, source(path), known), tokenizer, row_tokens=40)
    model = RewardModel.from_decoder(load_model(base, dtype=torch.float32), 2)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    objective = Labelling(LabelledRows(parts.training, seed=1), parts.validation, ("wet", "fifth"))
    expected, count = 0.0, 12
    half_known = 0
    for n in range(count):
        row = LabelledRows(parts.training, seed=1).number(n)
        half_known += math.isnan(row.labels[0])
        for logit, label in zip(plain_logits(model, torch.tensor(row.ids)).tolist(), row.labels, strict=True):
            if not math.isnan(label):
                expected += math.log1p(math.exp(-logit if label else logit))
    assert 0 < half_known < count
    whole = objective.loss(model, 0, count)
    pieces = [objective.loss(model, first, 4) for first in (0, 4, 8)]
    assert float(whole.total.detach()) == pytest.approx(expected, rel=1e-4)
    assert sum(float(piece.total.detach()) for piece in pieces) == pytest.approx(expected, rel=1e-4)
    assert whole.items == count


def test_texts_keep_their_part_and_what_is_reported_on_is_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    everything = rows(80)
    forward = write_jsonl(tmp_path / "a.jsonl", everything)
    mixed = write_jsonl(tmp_path / "b.jsonl", [*reversed(everything), *everything[:7], {**rows(1)[0], "text": ""}])
    write_jsonl(tmp_path / "reported.jsonl", everything[:20])
    one = read_labelled(data(tmp_path, source(forward)), tokenizer, row_tokens=40)
    other = read_labelled(data(tmp_path, source(mixed)), tokenizer, row_tokens=40)
    for part in ("training", "calibration", "validation"):
        assert {str(row.ids) for row in getattr(one, part)} == {str(row.ids) for row in getattr(other, part)}
        assert getattr(one, part)
    assert other.counts["water"] == {"read": 88, "empty": 1, "same": 7, "left_out": 0, "kept": 80}
    assert one.fingerprint() != other.fingerprint()
    without = read_labelled(data(tmp_path, source(forward), leave_out=["reported.jsonl"]), tokenizer, row_tokens=40)
    assert without.counts["water"]["left_out"] == 20
    kept = {str(row.ids) for row in [*without.training, *without.calibration, *without.validation]}
    assert not kept & {str(tokenizer.encode(row["text"])) for row in everything[:20]}


def test_templates_and_limits_and_constant_labels(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [{"messages": [{"content": f"Hello {n}"}, {"content": f"The hill, {n}"}]} for n in range(50)]
    path = write_jsonl(tmp_path / "talk.jsonl", talk)
    wanted = source(path, text="{messages[1][content]}", labels={"wet": False, "fifth": True}, limit=25)
    parts = read_labelled(data(tmp_path, wanted), tokenizer, row_tokens=40)
    found = [*parts.training, *parts.calibration, *parts.validation]
    assert {tokenizer.decode(row.ids) for row in found} == {f"The hill, {n}" for n in range(0, 50, 2)}
    assert {row.labels for row in found} == {(0.0, 1.0)}


def test_what_cannot_be_used_is_said_with_its_place(
    tokenizer: Tokenizer, base: Path, toml: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [*rows(30), {"words": "no text"}])

    def read(**changes: Any) -> None:
        read_labelled(data(tmp_path, {**source(path), **changes}), tokenizer, row_tokens=40)

    with pytest.raises(DataError, match=r"bad.jsonl, line 31: the template '\{text\}' cannot be filled"):
        read()
    with pytest.raises(DataError, match=r"do not exist: .*absent\.jsonl"):
        read(path=str(tmp_path / "absent.jsonl"))
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "The sea"}])
    with pytest.raises(DataError, match="line 1: the row has no key 'label'"):
        read()
    with pytest.raises(DataError, match="No row is left for"):
        read(labels={"wet": True})
    with pytest.raises(DataError, match="row_tokens is 40"):
        classifier_stage(recipe(toml, save_base(tokenizer, tmp_path / "short", context_length=20)))
    toml.write_text(toml.read_text().replace("wet = {", "dry = {"))
    with pytest.raises(RecipeError, match="'dry' is none of the labels wet"):
        load_recipe(toml, LabelledData)


@pytest.mark.parametrize("changes", [{"lora": {"rank": 2}}, {"sample_every": 2, "sample_prompts": ("Hello",)}])
def test_what_means_nothing_to_a_classifier_is_refused(toml: Path, base: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a classifier"):
        recipe(toml, base, **changes)
