"""Stages on preferences: the right gradients in pieces of any size, and a resumed run that ends in the same bits."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gale.core.errors import ModelError
from gale.data.shards import TokenSplit
from gale.model.adapter_folder import merge_adapter, open_with_adapter
from gale.model.checkpoint import load_model
from gale.model.lora import adapted
from gale.model.reward_model import RewardModel, load_reward_model
from gale.model.transformer import Decoder
from gale.text.tokenizer import END_OF_TURN, Tokenizer
from gale.train.batches import IGNORED, Batch
from gale.train.dpo import DirectPreference, dpo
from gale.train.next_token import next_token
from gale.train.pairs import PairedRows
from gale.train.recipe import DpoRecipe, RewardRecipe, SftRecipe
from gale.train.reward import BradleyTerry, reward
from gale.train.sft import sft
from gale.train.stage import Objective
from gale.train.tuning import tuned_reward_model
from tests.tiny_model import MIXTURE
from tests.train.preferences import ROWS, prepare_pairs, recipe, save_base
from tests.train.runs import metrics

STAGES: dict[str, tuple[Callable[..., dict[str, Any]], type[Any]]] = {
    "reward": (reward, RewardRecipe),
    "dpo": (dpo, DpoRecipe),
}


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_pairs(tokenizer, tmp_path_factory.mktemp("pairs"), ROWS[:5], ROWS[5:])


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tokenizer, tmp_path_factory.mktemp("base") / "base")


def train(name: str, data: Path, base: Path, out: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    run, kind = STAGES[name]
    return run(recipe(kind, data, base, **changes), out, resume=resume)


# What a stage computes, written out document by document in float64.


def plain_attention(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
    """Causal attention over one document, as in the textbook."""
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k_NKD, v_NKD))
    scores = torch.einsum("qhd,khd->hqk", q_NHD, k) / math.sqrt(q_NHD.shape[-1])
    hidden = torch.ones(len(q_NHD), len(q_NHD), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def read(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(ids, torch.arange(len(ids)), plain_attention)
    return found


def answer_logprob(model: Decoder, ids: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Log-probability of the trained targets of a document, and how many there are."""
    logprobs = model.logits(read(model, ids)).log_softmax(-1)
    places = [place for place, target in enumerate(targets.tolist()) if target != IGNORED]
    return sum((logprobs[place, targets[place]] for place in places), torch.zeros((), dtype=torch.float64)), len(places)


def documents(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch.ids_N.split(batch.lengths), batch.targets_N.split(batch.lengths), strict=True))


def expected_dpo(model: Decoder, reference: Decoder, batch: Batch, wanted: DpoRecipe) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    pieces = documents(batch)
    for chosen, rejected in zip(pieces[::2], pieces[1::2], strict=True):
        (log_c, count_c), (log_r, count_r) = answer_logprob(model, *chosen), answer_logprob(model, *rejected)
        with torch.no_grad():
            ratio_c = log_c - answer_logprob(reference, *chosen)[0]
            ratio_r = log_r - answer_logprob(reference, *rejected)[0]
        ratio_c, ratio_r = log_c - (log_c - ratio_c).detach(), log_r - (log_r - ratio_r).detach()
        if wanted.length_normalised:
            ratio_c, ratio_r = ratio_c / count_c, ratio_r / count_r
        lead = ratio_c - ratio_r
        if wanted.loss == "ipo":
            loss = (lead - 1 / (2 * wanted.beta)) ** 2
        else:
            right, wrong = (-torch.log(1 / (1 + torch.exp(-sign * wanted.beta * lead))) for sign in (1, -1))
            loss = (1 - wanted.label_smoothing) * right + wanted.label_smoothing * wrong
        total = total + loss - wanted.sft_weight * log_c / count_c
    return total


def expected_reward(model: RewardModel, batch: Batch, wanted: RewardRecipe) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    pieces = documents(batch)
    for (chosen, _), (rejected, _) in zip(pieces[::2], pieces[1::2], strict=True):
        r_c, r_r = (
            model.score(model.trunk(ids, torch.arange(len(ids)), plain_attention))[-1, 0] for ids in (chosen, rejected)
        )
        total = total - torch.log(1 / (1 + torch.exp(-(r_c - r_r - wanted.margin)))) + wanted.centre * (r_c + r_r) ** 2
    return total


def check_gradients(model: nn.Module, objective: Objective[Any], expected: Callable[[nn.Module], Tensor]) -> None:
    wide = copy.deepcopy(model).double()
    loss = objective.loss(model, 2, 2)
    loss.total.backward()
    value = expected(wide)
    value.backward()
    assert float(loss.total.detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in wide.parameters())
    assert largest > 1e-4
    for (name, ours), theirs in zip(model.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.5, "label_smoothing": 0.2},
        {"loss": "ipo", "length_normalised": True},
        {"sft_weight": 0.3, "length_normalised": True},
    ],
)
def test_the_gradient_of_dpo_is_that_of_its_formula(data: Path, base: Path, changes: dict[str, Any]) -> None:
    wanted = recipe(DpoRecipe, data, base, **changes)
    rows = PairedRows(TokenSplit(data, "train"), row_tokens=120, seed=wanted.seed)
    objective = DirectPreference(rows, {}, wanted)
    reference = load_model(base, dtype=torch.float32)
    objective.begin_step(reference, 0)
    model = copy.deepcopy(reference)
    torch.manual_seed(0)
    for parameter in model.parameters():  # a model that has left its reference
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = rows.batch(2, 2)
    check_gradients(model, objective, lambda wide: expected_dpo(wide, reference.double(), batch, wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"margin": 0.7, "centre": 0.2}])
def test_the_gradient_of_the_reward_model_is_that_of_its_formula(
    data: Path, base: Path, changes: dict[str, Any]
) -> None:
    wanted = recipe(RewardRecipe, data, base, **changes)
    rows = PairedRows(TokenSplit(data, "train"), row_tokens=120, seed=wanted.seed)
    model = RewardModel.from_decoder(load_model(base, dtype=torch.float32))
    torch.manual_seed(0)
    nn.init.normal_(model.score.weight)
    batch = rows.batch(2, 2)
    objective = BradleyTerry(rows, {}, wanted)
    check_gradients(model, objective, lambda wide: expected_reward(wide, batch, wanted))  # type: ignore[arg-type]


def test_the_gradient_of_fine_tuning_is_that_of_its_formula(prepared: Path, base: Path) -> None:
    objective = next_token(recipe(SftRecipe, prepared, base), prepared, loss_on="trained", long="cut")

    def expected(wide: nn.Module) -> Tensor:
        assert isinstance(wide, Decoder)
        pieces = documents(objective.training.batch(2, 2))
        return -sum((answer_logprob(wide, *piece)[0] for piece in pieces), torch.zeros((), dtype=torch.float64))

    check_gradients(load_model(base, dtype=torch.float32), objective, expected)


def test_fine_tuning_trains_the_token_that_ends_an_answer(prepared: Path, base: Path, tokenizer: Tokenizer) -> None:
    wanted = recipe(SftRecipe, prepared, base, row_tokens=200)
    rows = next_token(wanted, prepared, loss_on="trained", long="cut").training
    targets = rows.batch(0, rows.rows_of_epoch(0)).targets_N
    assert (targets != IGNORED).any()
    assert int((targets == tokenizer.token_id(END_OF_TURN)).sum()) == 7  # one answer in each of the conversations


@pytest.mark.parametrize("name", STAGES)
def test_accumulating_eight_pairs_one_by_one_is_a_batch_of_eight(
    data: Path, base: Path, tmp_path: Path, name: str
) -> None:
    for out, micro in (("whole", 8), ("pieces", 1)):
        train(name, data, base, tmp_path / out, batch_rows=8, micro_rows=micro, steps=4)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "pieces"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    one, other = (load_file(tmp_path / out / "model/model.safetensors") for out in ("whole", "pieces"))
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0, "dropout": 0.1}])
@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_ends_in_the_same_bits(
    data: Path, base: Path, tmp_path: Path, name: str, lora: dict[str, Any] | None
) -> None:
    changes = {"precision": "auto", "lora": lora}
    train(name, data, base, tmp_path / "whole", **changes)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(tmp_path / "whole", interrupted)
    shutil.rmtree(interrupted / "checkpoints/step-00000006")
    lines = (interrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "metrics.jsonl").write_text("".join(lines[:6]))
    train(name, data, base, interrupted, resume=True, **changes)
    assert metrics(interrupted) == metrics(tmp_path / "whole")
    weights = "model/model.safetensors" if lora is None else "model/adapter_model.safetensors"
    assert (interrupted / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STAGES)
def test_the_first_loss_is_that_of_no_preference(
    data: Path, base: Path, tmp_path: Path, name: str, precision: str
) -> None:
    changes = {"precision": precision, "steps": 1, "optimiser": {"learning_rate": 1e-30, "warmup_steps": 0}}
    train(name, data, base, tmp_path / "run", **changes)
    [row] = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert row["accuracy"] == 0  # nothing is ahead by even the last bit
    assert row["held_out"]["held"] == pytest.approx(math.log(2), rel=1e-6)
    assert row["held_out"]["held_accuracy"] == 0.5


def test_dpo_learns_its_pairs_and_logs_by_how_much(data: Path, base: Path, tmp_path: Path) -> None:
    train("dpo", data, base, tmp_path / "run", steps=20)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["accuracy"] == 1
    assert rows[-1]["margin"] > 0
    assert rows[0]["chosen_logprob"] < 0
    assert {"held", "held_accuracy"} == rows[-1]["held_out"].keys()
    load_model(tmp_path / "run/model", dtype=torch.float32)


def test_a_trained_reward_model_is_a_folder_to_train_on_from(data: Path, base: Path, tmp_path: Path) -> None:
    train("reward", data, base, tmp_path / "run", steps=20)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["chosen_reward"] > rows[-1]["rejected_reward"]
    assert abs(rows[-1]["chosen_reward"] + rows[-1]["rejected_reward"]) < 2  # centred
    load_reward_model(tmp_path / "run/model", dtype=torch.float32)
    train("reward", data, tmp_path / "run/model", tmp_path / "further", steps=1)
    assert metrics(tmp_path / "further")[0]["loss"] < 0.5 * rows[0]["loss"]
    with pytest.raises(ModelError, match="scores it"):
        train("dpo", data, tmp_path / "run/model", tmp_path / "refused")


@pytest.mark.parametrize("name", STAGES)
def test_a_mixture_of_experts_learns_preferences_with_its_routers_watched(
    data: Path, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    train(name, data, save_base(tokenizer, tmp_path / "base", **MIXTURE), tmp_path / "run", steps=10)
    rows = metrics(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # the routers' losses are not counted in
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["balance_loss"] > 1


def test_adapters_alone_are_trained_and_hold_optimiser_state(prepared: Path, base: Path, tmp_path: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    wanted = recipe(SftRecipe, prepared, base, lora={"rank": 4}, steps=12, precision="bf16")
    sft(wanted, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    state = load_file(tmp_path / "run/checkpoints/step-00000012/state.safetensors")
    assert all(".lora_" in name for name in state if "/" in name)
    assert (base / "model.safetensors").read_bytes() == before
    model = open_with_adapter(base, tmp_path / "run/model", dtype=torch.float32)
    assert len(adapted(model)) == 14
    merge_adapter(tmp_path / "run/model", base, tmp_path / "merged")
    load_model(tmp_path / "merged", dtype=torch.float32)


def test_training_goes_on_from_an_adapter_of_this_base_only(
    prepared: Path, base: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    adapter = tmp_path / "run/model"
    sft(recipe(SftRecipe, prepared, base, lora={"rank": 4}, steps=12), tmp_path / "run")
    onward = {"lora": {"adapter": adapter}, "steps": 1}
    sft(recipe(SftRecipe, prepared, base, **onward), tmp_path / "onward")
    assert metrics(tmp_path / "onward")[0]["loss"] < metrics(tmp_path / "run")[0]["loss"]
    moved = {"lora": {"adapter": shutil.copytree(adapter, tmp_path / "moved")}, "steps": 1}
    assert sft(recipe(SftRecipe, prepared, base, **moved), tmp_path / "onward", resume=True)["final"]["step"] == 1
    with pytest.raises(ValueError, match="leave out rank"):
        recipe(SftRecipe, prepared, base, lora={"adapter": adapter, "rank": 3})
    other = save_base(tokenizer, tmp_path / "other", norm_eps=1e-5, layers=3)
    with pytest.raises(ModelError, match="another base"):
        sft(recipe(SftRecipe, prepared, other, **onward), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_an_adapter_spares_a_third_of_the_operations_that_are_done_at_all(data: Path, base: Path) -> None:
    def flops(**changes: Any) -> float:
        wanted = recipe(RewardRecipe, data, base, **changes)
        return tuned_reward_model("reward", wanted, data, objective).flops_per_token

    training, held_out = (PairedRows(TokenSplit(data, name), row_tokens=120, seed=0) for name in ("train", "held"))
    objective = BradleyTerry(training, {"held": held_out}, recipe(RewardRecipe, data, base))
    config = load_model(base, dtype=torch.float32).config
    assert flops() - flops(lora={"rank": 2}) == pytest.approx(2 * config.body_parameters)


def test_a_reward_model_may_be_trained_as_an_adapter(data: Path, base: Path, tmp_path: Path) -> None:
    train("reward", data, base, tmp_path / "run", steps=12, lora={"rank": 4})
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    merge_adapter(tmp_path / "run/model", base, tmp_path / "merged")
    load_reward_model(tmp_path / "merged", dtype=torch.float32)
    state = load_file(tmp_path / "run/checkpoints/step-00000012/state.safetensors")
    assert "master/score.weight" in state
