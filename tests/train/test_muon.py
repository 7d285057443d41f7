"""Muon: Newton-Schulz against float64, against torch's own optimiser, and stacked experts against single matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gale.train.muon import Muon, newton_schulz
from gale.train.optim import MasterWeights
from gale.train.recipe import Optimiser

SHAPES = [(24, 24), (16, 64), (64, 16), (96, 257)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_newton_schulz_in_bf16_follows_float64(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns) @ torch.diag(torch.logspace(0, -2, columns))
    exact = newton_schulz(matrices.double(), torch.float64)
    rough = newton_schulz(matrices, torch.bfloat16).double()
    assert exact.shape == rough.shape == matrices.shape
    assert float((rough - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_update_is_nearly_the_orthogonal_factor(rows: int, columns: int) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(1, rows, columns)
    update = newton_schulz(matrix).double()[0]
    values = torch.linalg.svdvals(update)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrix.double()[0], full_matrices=False)
    cosine = (update * (u @ vh)).sum() / (update.norm() * (u @ vh).norm())
    assert float(cosine) > 0.95


def test_it_takes_the_steps_of_torchs_own_muon() -> None:
    torch.manual_seed(2)
    start = torch.randn(12, 20)
    ours, theirs = start.clone(), nn.Parameter(start.clone())
    muon = Muon([ours], momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(12, 20)
        theirs.grad = ours.grad.clone()
        muon.step(0.02)
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=2e-3, rtol=0)


def test_stacked_experts_step_as_single_matrices_do() -> None:
    torch.manual_seed(3)
    stacked = torch.randn(4, 8, 6)
    single = [matrix.clone() for matrix in stacked]
    stacked.grad = torch.randn(4, 8, 6)
    for matrix, gradient in zip(single, stacked.grad, strict=True):
        matrix.grad = gradient.clone()
    Muon([stacked], momentum=0.95, weight_decay=0.0, dtype=torch.float32).step(0.1)
    Muon(single, momentum=0.95, weight_decay=0.0, dtype=torch.float32).step(0.1)
    torch.testing.assert_close(stacked, torch.stack(single))


def test_embeddings_heads_and_vectors_are_left_to_adamw() -> None:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(6, 4),
            "q_proj": nn.Linear(4, 4),
            "lm_head": nn.Linear(4, 6, bias=False),
        }
    )
    settings = Optimiser.model_validate({"learning_rate": 0.1, "algorithm": "muon"})
    optimiser = MasterWeights(model, settings)
    model["lm_head"](model["q_proj"](model["embed_tokens"](torch.tensor([1, 2])))).sum().backward()
    optimiser.collect()
    optimiser.step(0.1, 1.0)
    kinds = {name.split("/")[0]: set() for name in optimiser.state()}
    for name in optimiser.state():
        kind, _, parameter = name.partition("/")
        kinds[kind].add(parameter)
    assert kinds["momentum"] == {"q_proj.weight"}
    assert kinds["exp_avg"] == {"embed_tokens.weight", "lm_head.weight", "q_proj.bias"}
