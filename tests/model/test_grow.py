"""A grown model computes what its source computed, its copies part in training, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gale
from gale.core.errors import ModelError
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model
from gale.model.config import Experts, ModelConfig
from gale.model.grow import deepen, logit_difference, upcycle, widen
from gale.model.transformer import Decoder

SHAPE: dict[str, Any] = {
    "family": "qwen3",
    "vocabulary_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "context_length": 100,
}
SOURCES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "one layer, one key head": {"layers": 1, "heads": 3, "kv_heads": 1},
    "as many key heads as heads": {"heads": 4, "kv_heads": 4},
    "llama with biases": {
        "family": "llama",
        "qk_norm": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    "window in upper layers": {
        "family": "qwen2",
        "qk_norm": False,
        "qkv_bias": True,
        "sliding_window": 7,
        "full_layers": (0, 1),
    },
    "experts": {"family": "qwen3_moe", "experts": Experts(4, 2, 24)},
    "experts in some layers": {
        "family": "qwen3_moe",
        "experts": Experts(4, 2, 24, every=2),
        "tied_embeddings": False,
    },
}
MIX = Experts(4, 2, 80)
GROWTHS: dict[str, Callable[[Decoder], Decoder]] = {
    "deeper, on top": lambda model: deepen(model, model.config.layers + 2),
    "deeper, thrice, on top": lambda model: deepen(model, 3 * model.config.layers),
    "deeper, interleaved": lambda model: deepen(model, 2 * model.config.layers + 1, placement="interleave"),
    "wider stream": lambda model: widen(model, hidden_size=96),
    "wider feed-forward": lambda model: widen(model, intermediate_size=2 * units(model)),
    "more heads": lambda model: widen(model, heads=4 * model.config.heads, kv_heads=2 * model.config.kv_heads),
    "more query heads": lambda model: widen(model, heads=3 * model.config.heads),
    "wider thrice in all": lambda model: widen(
        model,
        hidden_size=144,
        intermediate_size=3 * units(model),
        heads=3 * model.config.heads,
        kv_heads=3 * model.config.kv_heads,
    ),
    "deeper and wider": lambda model: widen(
        deepen(model, 2 * model.config.layers), hidden_size=96, heads=2 * model.config.heads
    ),
    "wider and deeper": lambda model: deepen(widen(model, hidden_size=96, intermediate_size=2 * units(model)), 5),
}


def source(**changes: Any) -> Decoder:
    """A small model in whose scores every weight shows."""
    model = Decoder(ModelConfig(**SHAPE | changes))
    model.initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def units(model: Decoder) -> int:
    experts = model.config.experts
    return experts.intermediate_size if experts else model.config.intermediate_size


def train(model: Decoder, steps: int) -> None:
    """A few steps on one text, with the plainest optimiser."""
    model.train()
    ids = torch.randint(0, 131, (60,), generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        logits = model.logits(model(ids[:-1], torch.arange(59), PackedAttention([59])))
        torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None


def copies(model: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows of what was doubled, as they were and as their copies."""
    layer = model.layers[-1]
    found = {
        "stream": layer.mlp.down_proj.weight,
        "heads": layer.self_attn.q_proj.weight,
        "values": layer.self_attn.v_proj.weight,
        "units": layer.mlp.up_proj.weight,
    }
    return {name: weight.detach().chunk(2) for name, weight in found.items()}  # type: ignore[misc]


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", SOURCES)
def test_the_grown_model_computes_what_its_source_computed(name: str, growth: str) -> None:
    model = source(**SOURCES[name])
    grown = GROWTHS[growth](model)
    difference, largest = logit_difference(model, grown)
    assert difference < 1e-5
    assert largest > 0.5
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in model.parameters())


def test_growing_leaves_the_source_as_it_was() -> None:
    model = source()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    grown = upcycle(widen(deepen(model, 6), hidden_size=96), Experts(4, 2, 80), redrawn=0.5)
    train(grown, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_same_seed_grows_the_same_model() -> None:
    for grow in (
        lambda seed: widen(source(), hidden_size=96, seed=seed),
        lambda seed: upcycle(source(), MIX, seed=seed),
    ):
        one, same, other = (dict(grow(seed).named_parameters()) for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_layers_stand_where_the_placement_says() -> None:
    model = source()

    def order(grown: Decoder) -> list[int]:
        queries = [layer.self_attn.q_proj.weight for layer in model.layers]
        return [
            next(i for i, weight in enumerate(queries) if torch.equal(weight, layer.self_attn.q_proj.weight))
            for layer in grown.layers
        ]

    assert order(deepen(model, 7)) == [0, 1, 2, 0, 1, 2, 0]
    assert order(deepen(model, 7, placement="interleave")) == [0, 0, 0, 1, 1, 2, 2]


def test_plain_stacking_copies_everything_and_is_another_function() -> None:
    model = source()
    grown = deepen(model, 6, preserve=False)
    for layer in range(6):
        theirs = dict(model.layers[layer % 3].named_parameters())
        for name, parameter in grown.layers[layer].named_parameters():
            assert torch.equal(parameter, theirs[name])
    assert logit_difference(model, grown)[0] > 0.1


def test_silent_layers_learn_from_the_first_step() -> None:
    grown = deepen(source(), 6)
    train(grown, 2)
    for layer in grown.layers[3:]:
        assert layer.self_attn.o_proj.weight.any()
        assert layer.mlp.down_proj.weight.any()


def parting(grown: Decoder) -> dict[str, float]:
    """How differently original and copy are trained: the norm of the difference as a share of the norm of the step."""
    before = {name: (one.clone(), other.clone()) for name, (one, other) in copies(grown).items()}
    train(grown, 12)
    shares = {}
    for name, (one, other) in copies(grown).items():
        steps = one - before[name][0], other - before[name][1]
        shares[name] = float((steps[0] - steps[1]).norm() / steps[0].norm())
    return shares


@pytest.mark.parametrize("deeper", [False, True])
@pytest.mark.parametrize("stream", [1, 2])
def test_copies_part_in_training(deeper: bool, stream: int) -> None:
    model = deepen(source(), 6) if deeper else source()
    grown = widen(model, hidden_size=48 * stream, intermediate_size=160, heads=12, kv_heads=4)
    shares = parting(grown)
    if stream == 1:
        del shares["stream"]  # has no copies
    assert min(shares.values()) > 0.01, shares


def test_without_noise_copies_stay_copies() -> None:
    grown = widen(source(), hidden_size=96, intermediate_size=160, heads=12, kv_heads=4, noise=0.0)
    shares = parting(grown)
    assert max(shares.values()) < 1e-3, shares


@pytest.mark.parametrize("per_token", [1, 3, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_copied_experts_compute_what_the_one_feed_forward_did(per_token: int, tied: bool) -> None:
    model = source(tied_embeddings=tied)
    grown = upcycle(model, Experts(4, per_token, 80))
    assert logit_difference(model, grown)[0] < 1e-5
    for layer in grown.layers:
        assert layer.mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_some_layers_may_stay_dense() -> None:
    model = source()
    grown = upcycle(model, Experts(4, 2, 80, dense_layers=(0,)))
    assert [grown.config.has_experts(layer) for layer in range(3)] == [False, True, True]
    assert logit_difference(model, grown)[0] < 1e-5


def test_deeper_wider_and_experts_in_one() -> None:
    model = source()
    grown = upcycle(widen(deepen(model, 5), hidden_size=96, intermediate_size=160, heads=12), Experts(3, 2, 160))
    assert logit_difference(model, grown)[0] < 1e-5


def test_equal_experts_part_in_training() -> None:
    grown = upcycle(source(), MIX)
    train(grown, 3)
    experts = grown.layers[0].mlp.experts.down_proj
    assert (experts[0] - experts[1]).abs().max() > 1e-4


def test_redrawing_nothing_is_plain_upcycling() -> None:
    plain, dropped = (dict(upcycle(source(), MIX, redrawn=share).named_parameters()) for share in (0.0, 0.001))
    assert all(torch.equal(plain[name], dropped[name]) for name in plain)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_exactly_the_stated_share_of_each_experts_units_is_redrawn_with_their_statistics(share: float) -> None:
    model = source()
    grown = upcycle(model, MIX, redrawn=share, seed=2)
    chosen = []
    for old, layer in zip(model.layers, grown.layers, strict=True):
        for up_2IC, down_CI in zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True):
            new = {"gate": up_2IC[:80], "up": up_2IC[80:], "down": down_CI.T}
            before = {name: getattr(old.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
            before["down"] = before["down"].T
            changed = {name: (new[name] != before[name]).all(1) for name in new}
            assert {int(mask.sum()) for mask in changed.values()} == {round(share * 80)}
            assert torch.equal(changed["gate"], changed["up"])
            assert torch.equal(changed["gate"], changed["down"])
            for name, mask in changed.items():
                assert torch.equal(new[name][~mask], before[name][~mask])
                assert new[name][mask].std().item() == pytest.approx(before[name][mask].std().item(), rel=0.1)
                assert new[name][mask].mean().item() == pytest.approx(before[name][mask].mean().item(), abs=0.01)
            chosen.append(changed["gate"])
    if share < 1:
        assert not torch.equal(chosen[0], chosen[1])
    assert logit_difference(model, grown)[0] > 0.1  # not function-preserving, and nobody says so


def test_a_trained_model_grows_within_rounding() -> None:
    model = load_model(Path(gale.__file__).parent / "registry/builtin/gale-0", dtype=torch.float32)
    sizes = {"hidden_size": 512, "intermediate_size": 1280, "heads": 8, "kv_heads": 4}
    for grown in (deepen(model, 8), widen(model, **sizes), upcycle(model, Experts(4, 2, 640))):
        difference, largest = logit_difference(model, grown)
        assert difference < 5e-6 * largest


REFUSED: dict[str, tuple[Callable[[], Decoder], str]] = {
    "as deep": (lambda: deepen(source(), 3), "not make it deeper"),
    "shallower": (lambda: deepen(source(), 2), "3 layers"),
    "narrower": (lambda: widen(source(), hidden_size=40), "cannot shrink to 40"),
    "half as wide again": (lambda: widen(source(), hidden_size=72), "hidden_size is 48 .* not a whole multiple"),
    "units": (lambda: widen(source(), intermediate_size=100), "intermediate_size is 80 .* whole multiple"),
    "heads": (lambda: widen(source(), heads=8), "heads is 6 .* whole multiple"),
    "key heads": (lambda: widen(source(), heads=12, kv_heads=3), "kv_heads is 2 .* whole multiple"),
    "more key heads than their queries": (lambda: widen(source(), heads=12, kv_heads=8), "unequal numbers of queries"),
    "experts of experts": (lambda: upcycle(upcycle(source(), MIX), MIX), "already"),
    "experts of a llama": (lambda: upcycle(source(family="llama", qk_norm=False), MIX), "QK-norm"),
    "experts of which only the upper could have a window": (
        lambda: upcycle(source(sliding_window=7, full_layers=(0, 1)), MIX),
        "layers have a window",
    ),
    "experts of another size": (lambda: upcycle(source(), Experts(4, 2, 40)), "40 units .* has 80"),
    "weights that do not sum to 1": (lambda: upcycle(source(), Experts(4, 2, 80, normalise=False)), "sum to 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_function_is_refused_with_the_reason(name: str) -> None:
    grow, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason):
        grow()
