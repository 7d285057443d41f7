"""The one training loop, on a tiny model in this process."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gale.core import files
from gale.core.errors import CheckpointError, DataError, GaleError
from gale.data.shards import fingerprint
from gale.model.checkpoint import load_model, save_model
from gale.model.config import ModelConfig
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train import next_token
from gale.train.batches import Batch
from gale.train.pretrain import pretrain
from gale.train.recipe import SftRecipe
from gale.train.sft import sft
from tests.train.runs import metrics, recipe

# Losses of sixteen steps, written down once. A change that means to leave the numbers alone leaves these alone.
GOLDEN = {
    "adamw": [
        5.9328,
        5.8719,
        5.8148,
        5.698,
        5.3889,
        5.1262,
        4.9538,
        4.7435,
        4.5835,
        4.3148,
        4.1225,
        4.0513,
        4.2655,
        3.8679,
        3.9459,
        3.7563,
    ],
    "muon": [
        5.9328,
        5.8771,
        5.8134,
        5.7282,
        5.4524,
        5.2624,
        5.0693,
        4.8463,
        4.6606,
        4.3734,
        4.1661,
        4.1084,
        4.2831,
        3.8902,
        3.9936,
        3.7533,
    ],
}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_the_loss_falls_and_everything_a_run_leaves_is_there(prepared: Path, tmp_path: Path) -> None:
    summary = pretrain(recipe(prepared, steps=40, evaluate_every=20), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["tokens"] == 40 * 4 * 48
    assert rows[-1]["held_out"]["english"] < rows[19]["held_out"]["english"]
    assert summary["final"]["loss"] == rows[-1]["loss"]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert (tmp_path / "run/curves.svg").read_text().startswith("<?xml")
    assert "english" in (tmp_path / "run/report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000038", "step-00000040"]


def test_a_warm_up_as_long_as_the_run_is_warned_of(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(recipe(prepared, steps=3), tmp_path / "enough")
    assert "warmup_steps" not in capsys.readouterr().err
    pretrain(recipe(prepared, steps=2), tmp_path / "short")
    assert "optimiser.warmup_steps (2) is no less than steps (2)" in capsys.readouterr().err
    assert [row["learning_rate"] for row in metrics(tmp_path / "short")] == [0.005, 0.01]


def test_the_first_loss_is_that_of_knowing_nothing(prepared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    pretrain(recipe(prepared, steps=1), tmp_path / "run")
    uniform = torch.tensor(float(tokenizer.vocabulary_size)).log().item()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(uniform, rel=0.02)


def test_the_exported_model_opens_here_and_in_transformers(prepared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pretrain(recipe(prepared, export="fp32"), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    load_model(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 48
    ours = Tokenizer.load(folder)
    assert model.generation_config.eos_token_id == [ours.token_id("<|end|>"), ours.token_id("<|endoftext|>")]


@pytest.mark.parametrize("export", ["fp32", "bf16"])
def test_what_is_exported_are_the_master_weights(prepared: Path, tmp_path: Path, export: str) -> None:
    pretrain(recipe(prepared, precision="bf16", export=export), tmp_path / "run")
    masters = load_file(tmp_path / "run/checkpoints/step-00000006/state.safetensors")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[export]
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, masters["master/" + name.removeprefix("model.")].to(dtype))


def test_accumulating_eight_rows_one_by_one_is_a_batch_of_eight(prepared: Path, tmp_path: Path) -> None:
    for name, micro in (("whole", 8), ("pieces", 1)):
        pretrain(recipe(prepared, batch_rows=8, micro_rows=micro, export="fp32"), tmp_path / name)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "pieces"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "pieces")[name], rtol=1e-3, atol=1e-4)


def test_held_out_rows_are_read_once_each(prepared: Path, tmp_path: Path) -> None:
    losses = []
    for micro in (1, 2, 4):  # the split has one row; reading on into its next epoch would count rows twice
        pretrain(recipe(prepared, steps=1, micro_rows=micro, evaluate_rows=3), tmp_path / str(micro))
        losses.append(metrics(tmp_path / str(micro))[-1]["held_out"]["english"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_fine_tuning_trains_on_the_assistants_tokens_only(prepared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    pretrain(recipe(prepared), tmp_path / "base")
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"})
    tuned = SftRecipe.model_validate(fields | {"base": tmp_path / "base" / "model"})
    sft(tuned, tmp_path / "sft")
    assert metrics(tmp_path / "sft")[-1]["step"] == 6
    load_model(tmp_path / "sft" / "model", dtype=torch.float32)


def test_fine_tuning_refuses_a_model_that_does_not_fit(prepared: Path, tmp_path: Path, model: Decoder) -> None:
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"}) | {"base": tmp_path / "small"}
    small = Decoder(ModelConfig("qwen3", 100, 16, 16, 1, 2, 1, 8, 64))
    save_model(small, tmp_path / "small")
    with pytest.raises(DataError, match="100"):
        sft(SftRecipe.model_validate(fields), tmp_path / "run")
    save_model(model, tmp_path / "small")
    with pytest.raises(DataError, match="row_tokens is 2048"):
        sft(SftRecipe.model_validate(fields | {"row_tokens": 2048}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fine_tuning_refuses_a_model_that_means_other_things_by_the_same_numbers(
    prepared: Path, tmp_path: Path
) -> None:
    pretrain(recipe(prepared), tmp_path / "base")
    base = tmp_path / "base" / "model"
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"}) | {"base": base}
    template = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(template))
    sft(SftRecipe.model_validate(fields | {"steps": 1}), tmp_path / "run")  # another template is no other vocabulary

    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="differ in 2 tokens, the first being 'a'") as caught:
        sft(SftRecipe.model_validate(fields), tmp_path / "refused")
    assert "own tokenizer" in str(caught.value.hint)
    assert not (tmp_path / "refused").exists()


def test_every_file_of_a_base_counts_when_fine_tuning_goes_on(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared), tmp_path / "base")
    base = tmp_path / "base" / "model"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = dict.fromkeys(tensors, "one.safetensors") | {"model.norm.weight": "two.safetensors"}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    fields: dict[str, Any] = recipe(prepared).model_dump(exclude={"model"}) | {"base": base}
    sft(SftRecipe.model_validate(fields), tmp_path / "run")
    save_file({"model.norm.weight": tensors["model.norm.weight"] * 2}, base / "two.safetensors")
    with pytest.raises(CheckpointError, match="base_fingerprint"):
        sft(SftRecipe.model_validate(fields), tmp_path / "run", resume=True)


def test_data_that_changed_since_it_was_prepared_is_not_trained_on(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    shard = tmp_path / "data/train-00000.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # may now be a token that the vocabulary lacks
    shard.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        pretrain(recipe(tmp_path / "data"), tmp_path / "run")


def test_two_trainings_in_one_folder_are_refused(prepared: Path, tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "run" / "run.lock"),
        pytest.raises(GaleError, match="Another process is training") as caught,
    ):
        pretrain(recipe(prepared), tmp_path / "run", resume=True)
    assert "--out" in str(caught.value.hint)
    assert pretrain(recipe(prepared), tmp_path / "run")["final"]["step"] == 6


def test_a_run_goes_on_in_its_own_number_format_only(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared, precision="auto"), tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float8"}))
    with pytest.raises(CheckpointError, match=r"dtype: 'float8' then, '\w+' now"):
        pretrain(recipe(prepared, precision="auto"), tmp_path / "run", resume=True)


def test_another_machine_is_named_and_an_older_checkpoint_that_names_none_goes_on(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(recipe(prepared), tmp_path / "run")
    states = {path: json.loads(path.read_text()) for path in (tmp_path / "run/checkpoints").glob("*/state.json")}
    pretrain(recipe(prepared), tmp_path / "run", resume=True)
    assert "may differ" not in capsys.readouterr().err
    for path, state in states.items():
        path.write_text(json.dumps(state | {"machine": state["machine"] | {"device": "abacus", "threads": 99}}))
    pretrain(recipe(prepared), tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert "may differ in the last bits" in said
    assert "machine.device: 'abacus' then" in said
    assert "machine.threads: 99 then" in said
    assert "machine.torch" not in said
    for path, state in states.items():
        path.write_text(json.dumps({key: state[key] for key in state.keys() - {"machine", "dtype"}}))
    assert pretrain(recipe(prepared), tmp_path / "run", resume=True)["final"]["step"] == 6
    assert "may differ" not in capsys.readouterr().err


def test_a_run_that_breaks_down_says_so_and_keeps_its_last_sound_checkpoint(prepared: Path, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "gradient_clip": 1e30}
    with pytest.raises(GaleError, match="broke down at step") as caught:
        pretrain(recipe(prepared, optimiser=wild, checkpoint_every=1), tmp_path / "run")
    assert "lower optimiser.learning_rate" in str(caught.value.hint)
    for path in (tmp_path / "run/checkpoints").glob("*/state.safetensors"):
        assert all(torch.isfinite(tensor.float()).all() for tensor in load_file(path).values())


def test_a_folder_that_holds_a_run_is_not_overwritten(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared, steps=1), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(CheckpointError, match="already holds a run") as caught:
        pretrain(recipe(prepared, steps=1), tmp_path / "run")
    assert "--resume" in str(caught.value.hint)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_run_resumed_from_a_checkpoint_ends_in_the_same_bits(prepared: Path, tmp_path: Path, steps: int) -> None:
    wanted = recipe(prepared, precision="auto", export="fp32")
    pretrain(wanted, tmp_path / "whole")
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "whole", interrupted)
    for path in (interrupted / "checkpoints").iterdir():
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    lines = (interrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][: 10 * steps])  # killed within a line
    pretrain(wanted, interrupted, resume=True)
    assert metrics(interrupted) == metrics(tmp_path / "whole")
    assert (interrupted / "model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors"
    ).read_bytes()


def test_a_damaged_checkpoint_is_passed_over_aloud(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(recipe(prepared), tmp_path / "run")
    expected = metrics(tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-00000006/state.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    pretrain(recipe(prepared), tmp_path / "run", resume=True)
    assert "step-00000006 is damaged" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == expected
    for path in (tmp_path / "run/checkpoints").glob("*/state.json"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match="All checkpoints"):
        pretrain(recipe(prepared), tmp_path / "run", resume=True)


def test_another_recipe_or_other_data_cannot_go_on_with_a_run(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared), tmp_path / "run")
    changed = recipe(prepared, seed=5, optimiser={"learning_rate": 0.02, "warmup_steps": 2})
    with pytest.raises(CheckpointError) as caught:
        pretrain(changed, tmp_path / "run", resume=True)
    assert "recipe.optimiser.learning_rate: 0.01 then, 0.02 now" in caught.value.message
    assert "recipe.seed: 0 then, 5 now" in caught.value.message
    assert "steps" not in caught.value.message

    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "more.npy").write_bytes(b"another")
    (other / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint(other)}))
    with pytest.raises(CheckpointError, match=rf"data_fingerprint.*'{fingerprint(other)}' now"):
        pretrain(recipe(other), tmp_path / "run", resume=True)


def test_the_same_data_may_lie_elsewhere_when_a_run_goes_on(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared), tmp_path / "run")
    shutil.copytree(prepared, tmp_path / "moved")
    assert pretrain(recipe(tmp_path / "moved"), tmp_path / "run", resume=True)["final"]["step"] == 6


def test_what_a_killed_write_left_behind_is_removed(prepared: Path, tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    leftover = tmp_path / f"run/checkpoints/.step-00000002.{ended.pid}-abcdef"
    leftover.mkdir(parents=True)
    pretrain(recipe(prepared), tmp_path / "run", resume=True)
    assert not leftover.exists()


def test_disk_faults_are_messages(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GaleError, match="cannot be made"):
        pretrain(recipe(prepared), tmp_path / "file" / "run")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(GaleError, match="Not allowed"):
            pretrain(recipe(prepared), tmp_path / "locked" / "run")
    with pytest.raises(GaleError, match="cannot be written: File name too long"):
        pretrain(recipe(prepared), tmp_path / ("x" * 300))


def test_a_full_disk_is_a_message_and_the_run_goes_on_when_there_is_room(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared, steps=2), tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a longer file fails as on a full disk
    try:
        with pytest.raises(GaleError, match=r"checkpoint .*cannot be written|No space left"):
            pretrain(recipe(prepared, steps=2), tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "new").rglob("*.safetensors"))
    pretrain(recipe(prepared, steps=2), tmp_path / "new", resume=True)
    assert metrics(tmp_path / "new") == metrics(tmp_path / "run")


def test_rows_longer_than_the_context_are_refused(prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"exceeds model.context_length"):
        recipe(prepared, row_tokens=64)


def test_compiling_without_a_compiler_is_a_message(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(GaleError, match="needs a C"):
        pretrain(recipe(prepared, compile=True), tmp_path / "run")


def test_rows_that_make_the_loss_no_number_are_named_with_their_documents(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = next_token.trained_logprobs

    def poisoned(model: Decoder, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        return whole(model, batch) * (math.nan if len(calls) == 8 else 1)  # the second half of the fourth step

    calls: list[Batch] = []
    monkeypatch.setattr(next_token, "trained_logprobs", poisoned)
    with pytest.raises(GaleError, match=r"step 4: loss nan on rows 14 to 15: train \d+ \(number \d+ kept of") as caught:
        pretrain(recipe(prepared, evaluate_every=100), tmp_path / "run")
    assert "rows 12" not in caught.value.message
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_eight_pieces_of_one_row_make_the_step_of_one_piece_of_eight(
    prepared: Path, tmp_path: Path, algorithm: str
) -> None:
    for name, micro in (("8x1", 1), ("1x8", 8)):
        optimiser = {"learning_rate": 0.01, "warmup_steps": 2, "algorithm": algorithm}
        pretrain(recipe(prepared, batch_rows=8, micro_rows=micro, optimiser=optimiser), tmp_path / name)
    for one, eight in zip(metrics(tmp_path / "8x1"), metrics(tmp_path / "1x8"), strict=True):
        assert one["loss"] == pytest.approx(eight["loss"], abs=1e-5)
        assert one["gradient_norm"] == pytest.approx(eight["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_the_curve_is_the_golden_one(prepared: Path, tmp_path: Path, algorithm: str) -> None:
    optimiser = {"learning_rate": 0.02, "warmup_steps": 4, "algorithm": algorithm, "ema_decay": 0.8}
    pretrain(recipe(prepared, steps=16, optimiser=optimiser), tmp_path / "run")
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses == pytest.approx(GOLDEN[algorithm], abs=2e-4), [round(loss, 4) for loss in losses]


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_a_resumed_run_keeps_momenta_moving_average_and_usual_norms(
    prepared: Path, tmp_path: Path, algorithm: str
) -> None:
    optimiser = {"learning_rate": 0.01, "warmup_steps": 2, "algorithm": algorithm, "ema_decay": 0.5}
    wanted = recipe(prepared, export="fp32", optimiser=optimiser)
    pretrain(wanted, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000006")
    pretrain(wanted, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name in ("model/model.safetensors", "checkpoints/step-00000006/state.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert metrics(tmp_path / "cut")[-1]["held_out_average"] != metrics(tmp_path / "cut")[-1]["held_out"]


def test_the_first_line_tells_where_the_run_comes_from(prepared: Path, tmp_path: Path) -> None:
    pretrain(recipe(prepared), tmp_path / "run")
    pretrain(recipe(prepared), tmp_path / "run", resume=True)
    first, *rest = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert first["header"]["stage"] == "pretrain"
    assert first["header"]["recipe"]["steps"] == 6
    assert first["header"]["machine"]["torch"] == torch.__version__
    assert [row.get("step", "resumed") for row in rest] == [1, 2, 3, 4, 5, 6, "resumed"]


def test_a_mixture_of_experts_trains_with_its_routers_kept_even(prepared: Path, tmp_path: Path) -> None:
    experts = {"count": 4, "per_token": 2, "intermediate_size": 16, "balance_loss": 0.05}
    shape = recipe(prepared).model.model_dump(mode="json") | {"experts": experts}
    pretrain(recipe(prepared, steps=40, model=shape, evaluate_every=40), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["balance_loss"] < 1.1 * experts["per_token"]  # even is per_token, one expert alone is count
    assert rows[-1]["held_out"]["english"] < rows[-1]["loss"] + 1
    assert load_model(tmp_path / "run/model", dtype=torch.float32).config.experts.count == 4
