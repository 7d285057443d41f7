"""Memory in huge pages, for weights that are read from beginning to end at every step.

A page is 4 KiB; to look up where so many are costs as much as to read them, above all in a virtual machine: there two
threads read 35 GB a second from plain pages and 65 from huge ones (measured; AMD EPYC).
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE = 2 * 2**20
_LINE = 64


class HugePages:
    """A piece of memory for ``size`` bytes in tensors, in huge pages where the system has them."""

    def __init__(self, size: int) -> None:
        mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # the system has none
                mapping.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._used = -self._memory.data_ptr() % _HUGE

    @staticmethod
    def needed(sizes: list[int]) -> int:
        """Bytes for tensors of so many bytes each."""
        return sum(-(-size // _LINE) * _LINE for size in sizes)

    def room(self, size: int) -> Tensor:
        """A tensor of ``size`` bytes behind those that were given out already."""
        taken = self._memory[self._used : self._used + size]
        self._used += self.needed([size])
        return taken
