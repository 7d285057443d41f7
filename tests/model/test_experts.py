"""A mixture of experts is transformers' own, forwards and backwards, and its losses reach who trains it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model, stored_weights
from gale.model.experts import MixtureOfExperts, hide_from_compiler, route
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.model.test_families import EXPERTS, TOKENS, theirs
from tests.tiny_model import MIXTURE, make_model


@pytest.fixture
def mixture(tokenizer: Tokenizer) -> Decoder:
    return make_model(tokenizer, **MIXTURE)


def hidden(model: Decoder, ids: Tensor, lengths: list[int] | None = None) -> Tensor:
    lengths = lengths or [len(ids)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model(ids, positions, PackedAttention(lengths))


def some_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_and_losses_are_those_of_transformers(normalise: bool, tmp_path: Path) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    original = theirs("Qwen3Moe", {**EXPERTS, "norm_topk_prob": normalise, "mlp_only_layers": [1]})
    original.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32).train()
    ids = some_ids(TOKENS)

    output = original(ids[None], output_router_logits=True)
    routers = output.router_logits
    balance = torch.stack([load_balancing_loss_func((router,), 5, 2) for router in routers]).mean()
    z = torch.stack([router.logsumexp(-1).square().mean() for router in routers]).mean()
    (output.logits.logsumexp(-1).mean() + 0.1 * balance + 0.01 * z).backward()

    logits = ours.logits(hidden(ours, ids))
    losses = ours.auxiliary_losses()
    (logits.logsumexp(-1).mean() + 0.1 * losses["balance_loss"] + 0.01 * losses["z_loss"]).backward()

    torch.testing.assert_close(losses, {"balance_loss": balance, "z_loss": z})
    original_grads = {name.removeprefix("model."): p.grad for name, p in original.named_parameters()}
    for name, parameter in ours.named_parameters():  # both stack their experts alike
        torch.testing.assert_close(parameter.grad, original_grads.pop(name), rtol=1e-4, atol=1e-6)
    assert not original_grads


def test_the_balance_loss_rests_at_the_number_of_experts_a_token_and_rises_when_few_are_used(mixture: Decoder) -> None:
    layer: Any = mixture.train().layers[0].mlp
    x = torch.randn(500, mixture.config.hidden_size)
    with torch.no_grad():
        layer.gate.weight.normal_(std=1e-4)
        layer(x)
        assert float(layer.losses["balance_loss"]) == pytest.approx(2, abs=0.01)
        assert float(layer.losses["z_loss"]) == pytest.approx(float(torch.tensor(6.0).log() ** 2), abs=0.01)
        layer.gate.weight[:2] += 1.0
        layer(x.abs())
        assert float(layer.losses["balance_loss"]) > 5.5


def test_training_on_the_balance_loss_evens_the_load(mixture: Decoder) -> None:
    layer: Any = mixture.train().layers[0].mlp
    x = torch.randn(400, mixture.config.hidden_size) + 1
    optimiser = torch.optim.Adam([layer.gate.weight], lr=0.03)

    def busiest() -> float:
        return float(torch.bincount(route(layer.gate(x), 2, normalise=True)[1].flatten(), minlength=6).max() / 800)

    before = busiest()
    for _ in range(60):
        layer(x)
        layer.losses["balance_loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert before > 0.3
    assert busiest() < 0.25


def test_only_training_pays_for_the_losses(mixture: Decoder, model: Decoder) -> None:
    assert model.auxiliary_losses() == mixture.auxiliary_losses() == {}
    mixture.train()
    hidden(mixture, some_ids(9))
    assert set(mixture.auxiliary_losses()) == {"balance_loss", "z_loss"}
    hidden(mixture.eval(), some_ids(9))
    assert mixture.auxiliary_losses() == {}, "what is left of training must not be taken for new"


def test_a_token_is_routed_and_computed_alike_whatever_stands_beside_it(mixture: Decoder) -> None:
    layer: Any = mixture.layers[0].mlp
    x = torch.randn(64, mixture.config.hidden_size)
    with torch.inference_mode():
        together = layer(x)
        chosen = route(layer.gate(x), 2, normalise=True)[1]
        for row in range(len(x)):
            alone = x[row : row + 1]
            assert torch.equal(route(layer.gate(alone), 2, normalise=True)[1][0], chosen[row])
            torch.testing.assert_close(layer(alone)[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, MIXTURE], ids=["dense", "experts"])
def test_a_document_has_the_same_logits_whatever_is_packed_beside_it(
    kind: dict[str, Any], tokenizer: Tokenizer
) -> None:
    model = make_model(tokenizer, **kind)
    document = some_ids(30)
    with torch.no_grad():
        alone = model.logits(hidden(model, document))
        for first, last in ((1, 90), (64, 1), (130, 70)):
            row = torch.cat((some_ids(first, 1), document, some_ids(last, 2)))
            packed = model.logits(hidden(model, row, [first, 30, last]))[first : first + 30]
            torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
        # The mask does it: as one document the same tokens see each other.
        assert not torch.allclose(model.logits(hidden(model, row))[130:160], alone, rtol=1e-2, atol=1e-2)


def test_recomputing_activations_changes_no_gradient(mixture: Decoder) -> None:
    ids = some_ids(40)

    def gradients(recompute: bool) -> list[Tensor]:
        mixture.train().zero_grad()
        x, attend = mixture.embed_tokens(ids), PackedAttention([40])
        cos_sin = mixture.rotary(torch.arange(40), x.dtype)
        for block in mixture.layers:
            x = checkpoint(block, x, *cos_sin, attend, use_reentrant=False) if recompute else block(x, *cos_sin, attend)
        (mixture.norm(x).square().sum() + sum(mixture.auxiliary_losses().values())).backward()
        return [parameter.grad for parameter in mixture.parameters()]

    torch.testing.assert_close(gradients(recompute=True), gradients(recompute=False))


@pytest.mark.slow
def test_compiled_it_gives_the_same_whatever_the_split_among_experts(mixture: Decoder) -> None:
    def loss(ids: Tensor) -> Tensor:
        return hidden(mixture, ids).square().mean() + sum(mixture.auxiliary_losses().values())

    parameters = list(mixture.train().parameters())
    hide_from_compiler()
    compiled = torch.compile(loss)
    torch._dynamo.utils.counters.clear()
    graphs = []
    for seed in range(4):
        ids = some_ids(40, seed)
        expected = torch.autograd.grad(loss(ids), parameters, allow_unused=True)  # the head is not in this loss
        given = torch.autograd.grad(compiled(ids), parameters, allow_unused=True)
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0], "another split compiles nothing anew"


def test_an_expert_that_no_token_chose_has_a_gradient_of_zero(mixture: Decoder) -> None:
    layer: Any = mixture.train().layers[0].mlp
    layer(torch.randn(1, mixture.config.hidden_size)).sum().backward()
    used = layer.experts.down_proj.grad.flatten(1).any(1)
    assert used.sum() == 2


def test_bf16_stays_close_to_fp32(mixture: Decoder) -> None:
    layer: Any = mixture.layers[0].mlp
    x = torch.randn(200, mixture.config.hidden_size)
    narrow: Any = MixtureOfExperts(mixture.config).to(torch.bfloat16).eval()
    narrow.load_state_dict(layer.state_dict())
    with torch.no_grad():
        chosen = [route(mlp.gate(x.to(mlp.gate.weight.dtype)), 2, normalise=True)[1] for mlp in (layer, narrow)]
        same = (chosen[0].sort(-1)[0] == chosen[1].sort(-1)[0]).all(-1)
        assert same.float().mean() > 0.9, "few tokens stand between two experts"
        error = (narrow(x.bfloat16()).float() - layer(x))[same].norm() / layer(x)[same].norm()
    assert error < 0.03


def test_fresh_weights_are_small_and_the_way_out_smaller_by_depth(mixture: Decoder) -> None:
    mixture.initialise(1)
    layer: Any = mixture.layers[0].mlp
    stds = [float(w.detach().std()) for w in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj)]
    assert stds == pytest.approx([0.02, 0.02, 0.01], rel=0.1)  # 2 layers: a half


def test_the_stored_view_of_a_weight_is_the_weight(mixture: Decoder) -> None:
    stored = dict(stored_weights(mixture))
    layer: Any = mixture.layers[1].mlp
    assert torch.equal(stored["layers.1.mlp.experts.4.gate_proj.weight"], layer.experts.gate_up_proj[4, :24])
    assert torch.equal(stored["layers.1.mlp.experts.4.up_proj.weight"], layer.experts.gate_up_proj[4, 24:])
    with torch.no_grad():
        stored["layers.1.mlp.experts.4.down_proj.weight"].zero_()
    assert not layer.experts.down_proj[4].any()
    assert layer.experts.down_proj[3].any()


def test_a_shape_says_which_layers_have_experts(mixture: Decoder) -> None:
    config = replace(mixture.config, layers=6, experts=replace(mixture.config.experts, every=2, dense_layers=(3,)))
    assert [config.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]
