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

TOKENS, HEADS, KEY_HEADS, HEAD_DIM = 8192, 4, 2, 64
REPEATS = 15


def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {REPEATS} alternating repeats, medians\n")
    print("| document tokens | torch SDPA, documents batched (ms) | torch SDPA, packed rows with a mask (ms) | Gale (ms) | Gale : best torch |")
    print("|---|---|---|---|---|")
    for length in (64, 128, 256, 512):
        documents = TOKENS // length
        q, k, v = (
            torch.randn(TOKENS, heads, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        )
        attend = PackedAttention([length] * documents)
        rows = 512 // length
        block = torch.full((512, 512), float("-inf"), dtype=torch.bfloat16)
        for row in range(rows):
            low, high = row * length, (row + 1) * length
            block[low:high, low:high] = torch.zeros(length, length).masked_fill(
                torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")
            )

        def torch_batched(length: int = length) -> Tensor:
            parts = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

        def torch_masked(mask: Tensor = block) -> Tensor:
            parts = (x.unflatten(0, (-1, 512)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)

        def gale(attend: PackedAttention = attend) -> Tensor:
            return attend(0, q, k, v)

        times = alternate([torch_batched, torch_masked, gale])
        print(f"| {length} | {times[0]:.1f} | {times[1]:.1f} | {times[2]:.1f} | {times[2] / min(times[:2]):.2f} |")


def alternate(candidates: list[Callable[[], Tensor]]) -> list[float]:
    """Median milliseconds of each candidate's forward and backward, taken in turns."""
    times: list[list[float]] = [[] for _ in candidates]
    for repeat in range(REPEATS + 2):
        for index, candidate in enumerate(candidates):
            began = time.perf_counter()
            out = candidate()
            out.backward(torch.ones_like(out))
            if repeat >= 2:  # the first two warm up
                times[index].append((time.perf_counter() - began) * 1e3)
    return [statistics.median(series) for series in times]


if __name__ == "__main__":
    main()
