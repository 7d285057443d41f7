"""The optimiser: schedules at their corners, and master weights that lose no small step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gale.train.optim import MasterWeights, learning_rate
from gale.train.recipe import Optimiser


def settings(**fields: Any) -> Optimiser:
    return Optimiser.model_validate({"learning_rate": 1.0, "warmup_steps": 10, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decay_share": 0.4}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 1.0, 80: 0.5, 99: 1 / 40}),
        ({"decay_share": 0.4, "final_share": 0.2}, {60: 1.0, 80: 0.6, 100: 0.2}),
        ({"decay_share": 0.0}, {10: 1.0, 99: 1.0}),
        ({"schedule": "cosine"}, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ({"schedule": "cosine", "final_share": 0.1}, {55: 0.55, 100: 0.1}),
        ({"warmup_steps": 0}, {0: 1.0}),
    ],
)
def test_the_schedule_passes_through_its_corners(fields: dict[str, Any], expected: dict[int, float]) -> None:
    for step, rate in expected.items():
        assert learning_rate(settings(**fields), step, 100) == pytest.approx(rate), step


def test_in_fp32_it_is_torchs_own_adamw_with_clipping() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 5), nn.Linear(6, 5)
    theirs.load_state_dict(ours.state_dict())
    optimiser = MasterWeights(ours, settings(weight_decay=0.1, gradient_clip=0.5))
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(5):
        x = torch.randn(8, 6)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        optimiser.collect()
        norm, taken = optimiser.step(0.01, gradient_scale=1 / 8)
        for parameter in theirs.parameters():
            parameter.grad /= 8
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 0.01
        reference.step()
        reference.zero_grad()
        assert taken
        assert norm == pytest.approx(float(expected)), step
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_steps_too_small_for_bf16_add_up_in_the_masters() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimiser = MasterWeights(model, settings(weight_decay=0.0))
    for _ in range(100):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimiser.collect()
        optimiser.step(1e-4, 1.0)
    assert model.weight.item() == pytest.approx(0.99, abs=0.003)
    assert optimiser.masters[0].item() == pytest.approx(0.99, abs=1e-4)


def test_a_gradient_that_is_no_number_leaves_the_weights_as_they_were() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimiser = MasterWeights(model, settings())
    (model(torch.ones(1, 2)).sum() * math.inf).backward()
    optimiser.collect()
    norm, taken = optimiser.step(0.1, 1.0)
    assert not math.isfinite(norm)
    assert not taken
    assert torch.equal(model.weight, before)


def test_the_state_goes_back_to_where_the_masters_are() -> None:
    model = nn.Linear(2, 2)
    optimiser = MasterWeights(model, settings())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.collect()
    optimiser.step(0.1, 1.0)
    saved = {name: tensor.clone() for name, tensor in optimiser.state().items()}
    # The meta device stands for an accelerator, which the machine that tests may lack.
    optimiser.masters = [master.to("meta") for master in optimiser.masters]
    optimiser._parameters = [parameter.to("meta") for parameter in optimiser._parameters]
    optimiser.load_state(saved)
    devices = {name: tensor.device.type for name, tensor in optimiser.state().items() if name != "norms"}
    assert devices == dict.fromkeys(saved.keys() - {"norms"}, "meta")


def one_step(model: nn.Linear, optimiser: MasterWeights, gradient: float) -> tuple[float, bool]:
    (model(torch.ones(1, 1)).sum() * gradient).backward()
    optimiser.collect()
    return optimiser.step(0.1, 1.0)


def test_a_spike_is_skipped_and_a_norm_that_stays_high_is_not() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimiser = MasterWeights(model, settings(spike_factor=5.0, gradient_clip=1e9))
    assert all(one_step(model, optimiser, 1.0)[1] for _ in range(20))
    before = model.weight.detach().clone()
    norm, taken = one_step(model, optimiser, 6.0)
    assert (round(norm, 3), taken) == (6.0, False)
    assert torch.equal(model.weight, before)
    assert one_step(model, optimiser, 4.0)[1]
    taken_in_the_end = [one_step(model, optimiser, 6.0)[1] for _ in range(64)]
    assert not taken_in_the_end[0]
    assert taken_in_the_end[-1]


def test_no_step_is_called_a_spike_before_there_is_a_usual_norm() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimiser = MasterWeights(model, settings(spike_factor=2.0))
    assert all(one_step(model, optimiser, 10.0**power)[1] for power in range(5))


def test_the_moving_average_is_that_of_the_weights_and_is_what_is_exported() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimiser = MasterWeights(model, settings(ema_decay=0.75, weight_decay=0.0))
    expected = float(model.weight.detach())
    for _ in range(5):
        one_step(model, optimiser, 1.0)
        expected = 0.75 * expected + 0.25 * float(model.weight.detach())
    last = float(model.weight.detach())
    optimiser.refresh(averaged=True)
    assert float(model.weight.detach()) == pytest.approx(expected)
    optimiser.refresh()
    assert float(model.weight.detach()) == last
    assert float(optimiser.whole_weights()["weight"]) == pytest.approx(expected)


def test_what_is_frozen_is_neither_stepped_nor_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimiser = MasterWeights(model, settings())
    assert optimiser.names == ["1.weight", "1.bias"]
    before = model[0].weight.clone()
    model(torch.ones(1, 2)).sum().backward()
    optimiser.collect()
    optimiser.step(0.1, 1.0)
    assert torch.equal(model[0].weight, before)
