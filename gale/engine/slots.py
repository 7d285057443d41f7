"""Keys and values of many sequences in one piece, for generating much text with a small model.

Serving attends to each sequence by itself, which is fast where a sequence is long and a model wide. A small model
spends most of its time there on the loop, so rollouts lay their sequences side by side, each in a slot, and attend to
all that read one token in two matrix products. Slots that are in use stand together at the front.

Shape suffixes as in :mod:`gale.engine.kv_cache`; L layers, S sequences that read one token, P slots in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gale.engine.kv_cache import SequenceCache, attend_one
from gale.model.config import ModelConfig


class SlotCache(SequenceCache):
    """The cache of one sequence: a slot of :class:`SlotCaches`."""

    def __init__(self, config: ModelConfig, slot: int, keys_LKTD: Tensor, values_LKTD: Tensor) -> None:
        super().__init__(config, keys_LKTD, values_LKTD)
        self.slot = slot

    def reserve(self, tokens: int, *, expected: int = 0) -> None:
        """A slot has its final size from the beginning."""
        assert self.length + tokens <= self.capacity, "slots are as long as their longest sequence"

    def move(self, slot: int, keys_LKTD: Tensor, values_LKTD: Tensor) -> None:
        """Go on in another slot."""
        keys_LKTD[:, :, : self.length] = self._keys_LKTD[:, :, : self.length]
        values_LKTD[:, :, : self.length] = self._values_LKTD[:, :, : self.length]
        self.slot, self._keys_LKTD, self._values_LKTD = slot, keys_LKTD, values_LKTD


class SlotCaches:
    """``slots`` slots of ``capacity`` tokens. Implements :class:`gale.engine.kv_cache.Caches`."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, slots: int, capacity: int
    ) -> None:
        self.config = config
        # Zeros, because what a shorter sequence does not use is multiplied by a weight of zero, and must be a number.
        shape = (config.layers, slots, config.kv_heads, capacity, config.head_dim)
        self.keys_LSKTD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LSKTD = torch.zeros(shape, dtype=dtype, device=device)
        self._used: list[SlotCache] = []

    def take(self) -> SequenceCache:
        """The next free slot."""
        slot = len(self._used)
        self._used.append(SlotCache(self.config, slot, self.keys_LSKTD[:, slot], self.values_LSKTD[:, slot]))
        return self._used[-1]

    def give_back(self, cache: SequenceCache) -> None:
        """Free a slot; the sequence in the last one moves there."""
        assert isinstance(cache, SlotCache), "every cache here is a slot"
        last, slot = self._used.pop(), cache.slot
        if last is not cache:
            self._used[slot] = last
            last.move(slot, self.keys_LSKTD[:, slot], self.values_LSKTD[:, slot])

    def attention(self, caches: list[SequenceCache], counts: list[int]) -> SlotAttention:
        """``attend`` for a batch in which each sequence reads so many tokens."""
        return SlotAttention(self, caches, counts)

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self._used)


class SlotAttention:
    """``attend`` for a batch: those that read one token together, the others one after another."""

    def __init__(self, slots: SlotCaches, caches: list[SequenceCache], counts: list[int]) -> None:
        self._slots = slots
        device = slots.keys_LSKTD.device
        rows, places, lengths = [], [], []
        self._longer: list[tuple[int, int, SequenceCache]] = []
        low = 0
        for cache, count in zip(caches, counts, strict=True):
            assert isinstance(cache, SlotCache), "every cache here is a slot"
            if count == 1:
                rows.append(low)
                places.append(cache.slot)
                lengths.append(cache.length)
            else:
                self._longer.append((low, low + count, cache))
            low += count
        self._rows_S, self._places_S, self._lengths_S = (
            torch.tensor(values, dtype=torch.int64, device=device) for values in (rows, places, lengths)
        )
        if not rows:
            return
        # Slots without a token in this batch compute with row 0, for nobody.
        self._tokens = max(lengths) + 1
        self._row_P = torch.zeros(slots.used, dtype=torch.int64, device=device).index_copy(
            0, self._places_S, self._rows_S
        )
        newest_P = torch.zeros_like(self._row_P).index_copy(0, self._places_S, self._lengths_S)
        place_T = torch.arange(self._tokens, device=device)
        self._future_PT = place_T > newest_P[:, None]
        window = slots.config.sliding_window
        self._left_behind_PT = None if window is None else place_T <= newest_P[:, None] - window

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        out_NHD = torch.empty_like(q_NHD)
        window, softcap = self._slots.config.window(layer), self._slots.config.attention_softcap
        for low, high, cache in self._longer:
            keys_KTD, values_KTD = cache.extend(layer, k_NKD[low:high], v_NKD[low:high])
            out_NHD[low:high] = attend_one(q_NHD[low:high], keys_KTD, values_KTD, window, softcap)
        if len(self._rows_S):
            keys_SKTD, values_SKTD = self._slots.keys_LSKTD[layer], self._slots.values_LSKTD[layer]
            keys_SKTD[self._places_S, :, self._lengths_S] = k_NKD[self._rows_S]
            values_SKTD[self._places_S, :, self._lengths_S] = v_NKD[self._rows_S]
            out_PHD = self._attend_together(q_NHD[self._row_P], keys_SKTD, values_SKTD, window is not None)
            out_NHD[self._rows_S] = out_PHD[self._places_S]
        return out_NHD

    def _attend_together(self, q_PHD: Tensor, keys_SKTD: Tensor, values_SKTD: Tensor, windowed: bool) -> Tensor:
        slots, key_heads, head_dim = len(q_PHD), keys_SKTD.shape[1], q_PHD.shape[2]
        keys_XTD = keys_SKTD[:slots, :, : self._tokens].flatten(0, 1)  # X is slots x key heads
        values_XTD = values_SKTD[:slots, :, : self._tokens].flatten(0, 1)
        q_XGD = q_PHD.view(slots * key_heads, -1, head_dim)
        scores_XGT = torch.bmm(q_XGD, keys_XTD.transpose(1, 2)).float().mul_(head_dim**-0.5)
        if (softcap := self._slots.config.attention_softcap) is not None:
            scores_XGT.div_(softcap).tanh_().mul_(softcap)
        scores_PHT = scores_XGT.view(slots, -1, self._tokens)
        scores_PHT.masked_fill_(self._future_PT[:, None], float("-inf"))
        if windowed and self._left_behind_PT is not None:
            scores_PHT.masked_fill_(self._left_behind_PT[:, None], float("-inf"))
        weights_XGT = torch.softmax(scores_XGT, dim=-1).to(values_XTD.dtype)
        return torch.bmm(weights_XGT, values_XTD).view_as(q_PHD)
