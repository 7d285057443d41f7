"""All layers in one call of the kernels: to the bit what the modules compute one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gale.engine.kv_cache import OwnCaches, SequenceCache
from gale.model import kernels
from gale.model.native import NativeLayers
from gale.model.quantised import Weights, quantise
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, make_model

pytestmark = pytest.mark.skipif(not kernels.can_attend(), reason="this processor has no AVX512-BF16")

KINDS: dict[str, dict[str, Any]] = {
    "Qwen3": {},
    "Qwen2": {"family": "qwen2", "qkv_bias": True, "qk_norm": False},
    "Mistral": {"family": "mistral", "qk_norm": False, "sliding_window": 5},
    "odd sizes": {"hidden_size": 52, "intermediate_size": 70, "heads": 3, "kv_heads": 3, "head_dim": 20},
}


def drawn(tokenizer: Tokenizer, kind: dict[str, Any]) -> Decoder:
    """A model in bf16 of which no part is such that leaving it out would not show."""
    model, draws = make_model(tokenizer, **kind), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, generator=draws)
    return model.to(torch.bfloat16)


def prepared(tokenizer: Tokenizer, weights: Weights, kind: dict[str, Any]) -> Decoder:
    model = drawn(tokenizer, kind)
    quantise(model, weights)
    return model


def read(model: Decoder, caches: list[SequenceCache], counts: list[int]) -> Tensor:
    """So many random tokens more for each sequence."""
    positions = [cache.length + place for cache, count in zip(caches, counts, strict=True) for place in range(count)]
    for cache, count in zip(caches, counts, strict=True):
        cache.reserve(count)
    ids = torch.randint(model.config.vocabulary_size, (len(positions),))
    weight = model.embed_tokens.weight
    attend = OwnCaches(model.config, weight.dtype, weight.device).attention(caches, counts)
    hidden: Tensor = model(ids, torch.tensor(positions), attend)
    for cache, count in zip(caches, counts, strict=True):
        cache.advance(count)
    return hidden


@torch.inference_mode()
def states(model: Decoder) -> list[Tensor]:
    """Hidden states of three sequences: prompts of different lengths together, then single tokens, then both."""
    torch.manual_seed(0)
    own = OwnCaches(model.config, model.embed_tokens.weight.dtype, torch.device("cpu"))
    caches = [own.take() for _ in range(3)]
    return [read(model, caches, counts) for counts in ([9, 1, 30], [1, 1, 1], [1, 17, 1])]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_one_call_computes_what_the_modules_compute(
    tokenizer: Tokenizer, weights: Weights, kind: dict[str, Any]
) -> None:
    model = prepared(tokenizer, weights, kind)
    assert model.native is not None
    in_one_call = states(model)
    model.native = None
    for got, expected in zip(in_one_call, states(model), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_one_call_is_near_to_float64(tokenizer: Tokenizer, kind: dict[str, Any]) -> None:
    exact = states(drawn(tokenizer, kind).double())
    for got, expected in zip(states(prepared(tokenizer, "bf16", kind)), exact, strict=True):
        assert (got.double() - expected).norm() < 0.03 * expected.norm()


def test_what_the_kernels_cannot_put_together_is_left_to_the_modules(tokenizer: Tokenizer) -> None:
    for kind in (MIXTURE, {"attention_softcap": 20.0}, {"activation": "gelu_tanh"}, {"unit_offset_norms": True}):
        model = make_model(tokenizer, **kind).to(torch.bfloat16)
        quantise(model, "int8")
        assert model.native is None and not NativeLayers.serve(model)
        states(model)
