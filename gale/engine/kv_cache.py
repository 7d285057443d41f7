"""Keys and values of running sequences, and attention over them: what the engine hands to the decoder as ``attend``.

On a CPU each sequence keeps its keys and values in one piece, and attention loops over sequences with two matrix
products each: for one-token bf16 queries that measured many times faster than torch's fused attention or than
a padded batch, and pages would double the cost of reading.

Shape suffixes as in :mod:`gale.model.transformer`; T tokens of one sequence, Q its new ones, G query heads a key head.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gale.model import kernels
from gale.model.config import ModelConfig
from gale.model.transformer import Attend, Decoder

_FIRST_CAPACITY = 256


def cached_tokens_that_fit(model: Decoder, draft: Decoder | None = None) -> int:
    """Tokens whose keys and values fit into half of the memory that is free now; others need some too.

    With a ``draft`` model each token has keys and values in both.
    """
    weight = model.embed_tokens.weight
    if weight.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(weight.device)
    else:
        free = max(0, _free_memory() - model.mapped_bytes - (draft.mapped_bytes if draft else 0))
    token_bytes = sum(
        2 * each.config.layers * each.config.kv_heads * each.config.head_dim * each.embed_tokens.weight.element_size()
        for each in (model, draft)
        if each is not None
    )
    return int(free // 2 // token_bytes)


def _free_memory() -> int:
    """Bytes that can be had without swapping, what the system only caches among them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class SequenceCache:
    """Keys and values of one sequence in all layers; grows by doubling up to the model's context."""

    def __init__(self, config: ModelConfig, keys_LKTD: Tensor, values_LKTD: Tensor) -> None:
        self._config = config
        self._keys_LKTD, self._values_LKTD = keys_LKTD, values_LKTD
        self.length = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values [L, K, capacity, D], of which the first :attr:`length` tokens are filled."""
        return self._keys_LKTD, self._values_LKTD

    @property
    def capacity(self) -> int:
        """Tokens there is room for now."""
        return self._keys_LKTD.shape[2]

    def reserve(self, tokens: int, *, expected: int = 0) -> None:
        """Make room for ``tokens`` more, and if that takes memory for all that are ``expected``, to copy less later."""
        needed, capacity = self.length + tokens, self.capacity
        if needed > capacity:
            capacity = max(needed, self.length + expected, 2 * capacity, _FIRST_CAPACITY)
            self._resize(min(capacity, max(needed, self._config.context_length)))

    def trim(self, tokens: int) -> None:
        """Give back what is far more than ``tokens`` need."""
        if self.capacity > 2 * max(tokens, _FIRST_CAPACITY):
            self._resize(max(tokens, self.length))

    def _resize(self, capacity: int) -> None:
        # Both or neither: there may be memory for one only.
        keys, values = (_grown(each, capacity, self.length) for each in (self._keys_LKTD, self._values_LKTD))
        self._keys_LKTD, self._values_LKTD = keys, values

    def extend(self, layer: int, k_QKD: Tensor, v_QKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer and return all its keys and values [K, T, D].

        :attr:`length` moves only with :meth:`advance`, once every layer has stored its share.
        """
        end = self.length + len(k_QKD)
        self._keys_LKTD[layer, :, self.length : end] = k_QKD.transpose(0, 1)
        self._values_LKTD[layer, :, self.length : end] = v_QKD.transpose(0, 1)
        return self._keys_LKTD[layer, :, :end], self._values_LKTD[layer, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more as stored in every layer."""
        self.length += tokens

    def truncate(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""
        self.length = min(self.length, tokens)

    def copy_from(self, other: SequenceCache, tokens: int) -> None:
        """Begin with the first ``tokens`` of another sequence; this one must be empty."""
        self.reserve(tokens)
        self._keys_LKTD[:, :, :tokens] = other._keys_LKTD[:, :, :tokens]
        self._values_LKTD[:, :, :tokens] = other._values_LKTD[:, :, :tokens]
        self.length = tokens


class Caches(Protocol):
    """Where the keys and values of running sequences lie, and how a batch attends to them."""

    def take(self) -> SequenceCache:
        """The cache of a sequence that starts."""

    def give_back(self, cache: SequenceCache) -> None:
        """Free the cache of a sequence that has ended."""

    def attention(self, caches: list[SequenceCache], counts: list[int]) -> Attend:
        """``attend`` for a batch in which each sequence reads so many tokens."""


@dataclass(frozen=True, slots=True)
class OwnCaches:
    """Each sequence in a piece of its own. Implements :class:`Caches`."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def take(self) -> SequenceCache:
        """A cache without memory, which it gets once it is needed."""
        shape = (self.config.layers, self.config.kv_heads, 0, self.config.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return SequenceCache(self.config, keys, values)

    def give_back(self, cache: SequenceCache) -> None:
        """Its memory is freed with the sequence."""

    def attention(self, caches: list[SequenceCache], counts: list[int]) -> CachedAttention:
        """One sequence after another."""
        return CachedAttention(caches, counts, self.config)


class CachedAttention:
    """``attend`` for a batch: each sequence's new tokens stand one after another, ``counts`` of them."""

    def __init__(self, caches: list[SequenceCache], counts: list[int], config: ModelConfig) -> None:
        self.caches, self.counts, self.config = caches, counts, config

    @cached_property
    def batch(self) -> kernels.Batch:
        """What the kernels need to know of it, the same for all layers."""
        return kernels.sequences(
            [(*cache.tensors, cache.length, count) for cache, count in zip(self.caches, self.counts, strict=True)]
        )

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        window, softcap = self.config.window(layer), self.config.attention_softcap
        if kernels.serve(q_NHD) and kernels.can_attend() and q_NHD.shape[-1] % 4 == 0 and softcap is None:
            return kernels.attend(self.batch, layer, q_NHD, k_NKD, v_NKD, window)
        out_NHD = torch.empty_like(q_NHD)
        low = 0
        for cache, count in zip(self.caches, self.counts, strict=True):
            high = low + count
            keys_KTD, values_KTD = cache.extend(layer, k_NKD[low:high], v_NKD[low:high])
            out_NHD[low:high] = attend_one(q_NHD[low:high], keys_KTD, values_KTD, window, softcap)
            low = high
        return out_NHD


def attend_one(
    q_QHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, window: int | None, softcap: float | None = None
) -> Tensor:
    """Attention of a sequence's newest Q tokens over all its T tokens, causal: [Q, H, D] -> [Q, H, D]; fp32 softmax."""
    queries, _, head_dim = q_QHD.shape
    key_heads, tokens, _ = keys_KTD.shape
    if window is not None and tokens > window + queries - 1:  # no query sees further back than this
        first = tokens - window - queries + 1
        keys_KTD, values_KTD, tokens = keys_KTD[:, first:], values_KTD[:, first:], tokens - first
    q_KRD = q_QHD.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores_KRT = torch.bmm(q_KRD, keys_KTD.transpose(1, 2)).float().mul_(head_dim**-0.5)
    if softcap is not None:
        scores_KRT.div_(softcap).tanh_().mul_(softcap)
    if queries > 1:
        hidden_QT = torch.ones(queries, tokens, dtype=torch.bool, device=q_QHD.device).triu_(tokens - queries + 1)
        if window is not None:
            hidden_QT |= torch.ones_like(hidden_QT).tril_(tokens - queries - window)
        scores_KRT.unflatten(1, (-1, queries)).masked_fill_(hidden_QT, float("-inf"))
    weights_KRT = torch.softmax(scores_KRT, dim=-1).to(values_KTD.dtype)
    out_KGQD: Tensor = torch.bmm(weights_KRT, values_KTD).unflatten(1, (-1, queries))
    return out_KGQD.permute(2, 0, 1, 3).flatten(1, 2)


def _grown(old: Tensor, capacity: int, length: int) -> Tensor:
    new = torch.empty((*old.shape[:2], capacity, old.shape[3]), dtype=old.dtype, device=old.device)
    new[:, :, :length] = old[:, :, :length]
    return new
