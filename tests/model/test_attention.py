"""Packed attention is attention: document by document, forwards and backwards, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gale.model.attention import PackedAttention
from gale.model.config import ModelConfig

RAGGED = [3, 130, 1, 64, 200, 65]


def reference(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, lengths: list[int], window: int | None, softcap: float | None = None
) -> Tensor:
    """The textbook's formula, one document after another."""
    group = q_NHD.shape[1] // k_NKD.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (q_NHD, k_NKD, v_NKD)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | (distance >= (window or len(q)))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)))
    return torch.cat(outputs)


def packed(lengths: list[int], window: int | None) -> PackedAttention:
    config = ModelConfig("mistral", 10, 8, 8, 1, 1, 1, 8, context_length=1000, sliding_window=window)
    return PackedAttention(lengths, config=config)


def random_qkv(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(tokens, h, 8, dtype=dtype, generator=generator).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100, 1000])
@pytest.mark.parametrize("lengths", [[1], [64], RAGGED, [5] * 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (5, 1)])
def test_output_and_gradients_are_those_of_the_reference(
    lengths: list[int], window: int | None, heads: int, kv_heads: int
) -> None:
    qkv = random_qkv(sum(lengths), heads, kv_heads)
    grad = torch.randn(sum(lengths), heads, 8, dtype=torch.float64)
    out = packed(lengths, window)(0, *qkv)
    expected = reference(*qkv, lengths, window)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), rtol=1e-10, atol=1e-12
    )


def test_only_some_layers_have_the_sliding_window() -> None:
    qkv = random_qkv(40, 2, 1)
    config = ModelConfig(
        "qwen2", 10, 8, 8, 4, 1, 1, 8, context_length=1000, qk_norm=False, sliding_window=4, full_layers=(0, 2)
    )
    attend = PackedAttention([40], config=config)
    for layer in range(4):
        torch.testing.assert_close(attend(layer, *qkv), reference(*qkv, [40], 4 if layer % 2 else None))


@pytest.mark.parametrize("window", [None, 7])
def test_a_softcap_bends_scores_and_their_gradients(window: int | None) -> None:
    qkv = tuple(3 * x.detach() for x in random_qkv(150, 6, 2))
    for x in qkv:
        x.requires_grad_()
    config = ModelConfig(
        "gemma2", 10, 8, 8, 1, 6, 2, 8, context_length=1000, attention_softcap=2.0, sliding_window=window
    )
    grad = torch.randn(150, 6, 8, dtype=torch.float64)
    out = PackedAttention([130, 20], config=config)(0, *qkv)
    expected = reference(*qkv, [130, 20], window, softcap=2.0)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), rtol=1e-10, atol=1e-12
    )


def test_a_document_does_not_feel_its_neighbours() -> None:
    q, k, v = (x.detach().clone() for x in random_qkv(30, 2, 2))
    before = PackedAttention([10, 20])(0, q, k, v)
    for x in (q, k, v):
        x[10:] = 1e3
    after = PackedAttention([10, 20])(0, q, k, v)
    assert torch.equal(before[:10], after[:10])


def test_bf16_stays_close_to_fp32() -> None:
    wide = random_qkv(200, 4, 2, torch.float32)
    narrow = tuple(x.detach().bfloat16() for x in wide)
    out = PackedAttention([200])(0, *narrow)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(*wide, [200], None), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_compiled_it_gives_the_same() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, attend: PackedAttention) -> Tensor:
        return (attend(0, q * 2, k, v).sin()).sum()

    compiled = torch.compile(loss)
    for lengths in ([70, 10], [3, 77]):  # another packing must not go wrong on what was compiled for the first
        qkv = random_qkv(80, 4, 2, torch.float32)
        attend = packed(lengths, 50)
        expected = torch.autograd.grad(loss(*qkv, attend), qkv)
        torch.testing.assert_close(torch.autograd.grad(compiled(*qkv, attend), qkv), expected, rtol=1e-4, atol=1e-5)
