"""Attention for training on a CPU: Gale's packed attention beside torch's own, alternating, bf16, forward and backward.

    .venv/bin/python bench/attention.py

8,192 tokens in documents of one length; 4 query heads and 2 key heads of 64. Prints a Markdown table of median
milliseconds and the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gale.model.attention import PackedAttention

TOKENS, HEADS, KEY_HEADS, HEAD_DIM, ROW = 8192, 4, 2, 64, 512
REPEATS = 15


def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {REPEATS} alternating repeats, medians\n")
    print(
        "| document tokens | torch, documents batched (ms) | torch, rows of 512 with a mask (ms) | Gale (ms) | ratio |"
    )
    print("|---|---|---|---|---|")
    for length in (64, 128, 256, 512):
        batched, masked, gale = alternate(candidates(length))
        print(f"| {length} | {batched:.1f} | {masked:.1f} | {gale:.1f} | {gale / min(batched, masked):.2f} |")


def candidates(length: int) -> list[Callable[[], Tensor]]:
    """The three ways to attend over documents of ``length`` tokens, each from the same q, k and v."""
    q, k, v = (
        torch.randn(TOKENS, heads, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    attend = PackedAttention([length] * (TOKENS // length))
    documents = torch.arange(ROW) // length
    visible = (documents[:, None] == documents) & torch.ones(ROW, ROW, dtype=torch.bool).tril()

    def torch_sdpa(rows_of: int, **options: object) -> Tensor:
        parts = (x.unflatten(0, (-1, rows_of)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts, enable_gqa=True, **options)

    return [
        lambda: torch_sdpa(length, is_causal=True),
        lambda: torch_sdpa(ROW, attn_mask=visible),
        lambda: attend(0, q, k, v),
    ]


def alternate(ways: list[Callable[[], Tensor]]) -> list[float]:
    """Median milliseconds of each way's forward and backward, taken in turns."""
    times: list[list[float]] = [[] for _ in ways]
    for repeat in range(REPEATS + 2):
        for index, way in enumerate(ways):
            began = time.perf_counter()
            out = way()
            out.backward(torch.ones_like(out))
            if repeat >= 2:  # the first two warm up
                times[index].append((time.perf_counter() - began) * 1e3)
    return [statistics.median(series) for series in times]


if __name__ == "__main__":
    main()
