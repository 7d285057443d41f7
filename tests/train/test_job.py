"""The process of a fine-tuning job leaves a result whatever happens, and does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gale.data.examples import Examples
from gale.engine.local import LocalEngine
from gale.text.tokenizer import Tokenizer
from gale.train import job
from gale.train.job_recipe import Hyperparameters, TuningJob, recipe_of, settled
from tests.tiny_data import GRADER, write_jsonl
from tests.tiny_model import save_folder
from tests.train.runs import metrics

ROW = {
    "messages": [{"role": "user", "content": "Where does it go?"}, {"role": "assistant", "content": "To the sea."}],
}


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tokenizer, tmp_path_factory.mktemp("base") / "tiny")


def make(base: Path, folder: Path, rows: list[Any], **knobs: Any) -> TuningJob:
    """The folder of a job with its file of rows."""
    folder.mkdir()
    asked = TuningJob(
        method="supervised",
        base=base,
        training_file=write_jsonl(folder / "rows.jsonl", rows),
        hyperparameters=Hyperparameters(**knobs),
        seed=1,
    )
    (folder / job.JOB).write_text(asked.model_dump_json())
    return asked


def test_a_job_leaves_a_model_and_its_last_checkpoints_which_the_engine_serves(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    make(base, folder, [ROW] * 10, n_epochs=4, batch_size=4)
    job.validate(folder)
    validated = json.loads((folder / job.VALIDATED).read_text())
    assert validated["steps"] == 10 and validated["examples"]["train"]["rows"] == 10
    job.train(folder)
    trained = json.loads((folder / job.TRAINED).read_text())
    assert [each["step"] for each in trained["checkpoints"]] == [8, 9, 10]
    assert trained["checkpoints"][2]["train_loss"] < trained["checkpoints"][0]["train_loss"]
    assert trained["trained_tokens"] == 4 * validated["examples"]["train"]["tokens"] == validated["most_tokens"]
    engine = LocalEngine.load(base)
    for place in (job.ADAPTERS + "/step-8", job.RUN + "/model"):
        engine.load_adapter(place, folder / place)
    # The last checkpoint is the finished model.
    weights = [
        folder / place / "adapter_model.safetensors" for place in (f"{job.ADAPTERS}/step-10", f"{job.RUN}/model")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # Done once, it is not done again: the rows may be gone by then.
    (folder / "rows.jsonl").unlink()
    job.validate(folder)
    job.train(folder)


@pytest.mark.slow
def test_on_ray_the_same_is_trained(base: Path, tmp_path: Path) -> None:
    losses = []
    for name, ray in (("here", None), ("there", "local")):
        asked = make(base, tmp_path / name, [ROW] * 10, n_epochs=4, batch_size=4)
        (tmp_path / name / job.JOB).write_text(asked.model_copy(update={"ray": ray}).model_dump_json())
        job.validate(tmp_path / name)
        job.train(tmp_path / name)
        losses.append([row["loss"] for row in metrics(tmp_path / name / job.RUN)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_row_that_cannot_be_trained_on_is_a_result_too(base: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "job", [ROW] * 10 + [{"messages": 7}])
    job.validate(tmp_path / "job")
    error = json.loads((tmp_path / "job" / job.VALIDATED).read_text())["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "line 11" in error["message"]


@pytest.mark.parametrize("method", ["supervised", "dpo", "reinforcement"])
def test_no_more_is_trained_than_was_said_before(base: Path, tmp_path: Path, method: Any) -> None:
    asked = make(base, tmp_path / "job", [], n_epochs=3, batch_size=4)
    question = [{"role": "user", "content": "Where to?"}]

    def said(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    rows: list[dict[str, Any]] = []
    for number in range(10):  # of very different lengths; seven and a half steps are three epochs
        text = "To the sea. " * (1 + number)
        if method == "dpo":
            rows.append(
                {
                    "input": {"messages": question},
                    "preferred_output": [said(text)],
                    "non_preferred_output": [said("No.")],
                }
            )
        else:
            rows.append({"messages": question if method == "reinforcement" else [*question, said(text)], "answer": "e"})
    if method == "supervised":
        rows = [{"messages": row["messages"]} for row in rows]
    write_jsonl(asked.training_file, rows)
    asked = asked.model_copy(update={"method": method, "grader": GRADER if method == "reinforcement" else None})
    (tmp_path / "job" / job.JOB).write_text(asked.model_dump_json())
    job.validate(tmp_path / "job")
    most = json.loads((tmp_path / "job" / job.VALIDATED).read_text())["most_tokens"]
    job.train(tmp_path / "job")
    trained = json.loads((tmp_path / "job" / job.TRAINED).read_text())["trained_tokens"]
    assert 0 < trained <= most
    if method != "reinforcement":  # what answers will come to, nobody knows
        assert most < 1.4 * trained


@pytest.mark.parametrize(
    ("method", "rows", "epochs", "batch"),
    [
        ("supervised", 10, 10, 4),
        ("supervised", 200, 10, 8),
        ("supervised", 5000, 3, 32),
        ("dpo", 200, 3, 8),
        ("reinforcement", 100, 5, 4),
    ],
)
def test_what_is_left_to_gale_fits_the_rows(
    base: Path, tmp_path: Path, method: Any, rows: int, epochs: int, batch: int
) -> None:
    asked = make(base, tmp_path / "job", [ROW]).model_copy(update={"method": method})
    knobs = settled(asked, Examples(rows, rows * 20, 20))
    assert (knobs.n_epochs, knobs.batch_size) == (epochs, batch)
    asked.hyperparameters = Hyperparameters(n_epochs=1, batch_size=7)
    knobs = settled(asked, Examples(rows, rows * 20, 20))
    assert (knobs.n_epochs, knobs.batch_size) == (1, 7)
    if method != "reinforcement":
        recipe = recipe_of(asked, knobs, {"train": Examples(rows, rows * 20, 20)}, tmp_path)
        assert recipe.steps == -(-rows // 7) and recipe.batch_rows == 7 and recipe.lora is not None
