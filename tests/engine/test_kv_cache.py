"""The cache and its attention against a reference written with torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
