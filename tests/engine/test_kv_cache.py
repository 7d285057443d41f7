"""The cache and its attention against a reference written with torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gale.engine import kv_cache
from gale.engine.kv_cache import OwnCaches, attend_one
from gale.model.config import ModelConfig


@pytest.mark.parametrize("queries", [1, 5, 12])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_attention_equals_the_reference(queries: int, window: int | None) -> None:
    torch.manual_seed(0)
    heads, key_heads, dim, tokens = 6, 3, 8, 12
    q = torch.randn(queries, heads, dim, dtype=torch.float64).float()
    k, v = torch.randn(2, key_heads, tokens, dim)
    places = torch.arange(tokens)
    query_places = places[tokens - queries :, None]
    visible = places <= query_places
    if window is not None:
        visible &= places > query_places - window
    expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], visible, enable_gqa=True)
    torch.testing.assert_close(attend_one(q, k, v, window), expected[0].transpose(0, 1), atol=1e-6, rtol=1e-5)


def test_growing_keeps_what_is_stored() -> None:
    config = ModelConfig("qwen3", 10, 8, 8, 2, 2, 1, 4, context_length=1000)
    cache = OwnCaches(config, torch.float32, torch.device("cpu")).take()
    keys = torch.randn(900, 1, 4)
    for low, high in [(0, 200), (200, 201), (201, 700), (700, 900)]:
        cache.reserve(high - low)
        for layer in range(2):
            stored, _ = cache.extend(layer, keys[low:high] + layer, keys[low:high])
            torch.testing.assert_close(stored, (keys[:high] + layer).transpose(0, 1))
        cache.advance(high - low)
    assert cache.length == 900


def test_a_cache_that_cannot_grow_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that have grown beside values that have not would be written beyond their end."""
    config = ModelConfig("qwen3", 10, 8, 8, 2, 2, 1, 4, context_length=1000)
    cache = OwnCaches(config, torch.float32, torch.device("cpu")).take()
    cache.reserve(10)
    grown, calls = kv_cache._grown, []

    def second_fails(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return grown(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kv_cache, "_grown", second_fails)
    with pytest.raises(MemoryError):
        cache.reserve(900)
    assert cache.tensors[0].shape == cache.tensors[1].shape
    cache.reserve(900)
    assert cache.capacity >= 900
    assert cache.tensors[0].shape == cache.tensors[1].shape
    cache.trim(20)
    assert cache.capacity < 900
