"""A text as a row of units: words, and single characters in scripts that put no spaces between words.

What compares texts (near-duplicates, decontamination, repetition) works on n-grams of these units, hashed so that the
same n-gram has the same number in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

# Kana, Chinese characters with their extensions and compatibility forms; Thai, Lao, Burmese and Khmer.
_SPACELESS = (
    "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_UNIT = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+(?:['’][^\W{_SPACELESS}]+)*")
_FIRST_SPACELESS = "\u0e01"
_BASE = np.uint64(0x9E3779B97F4A7C15)


class TextUnits:
    """The units of one text, in lower case."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def units(self) -> list[str]:
        """Words and characters; found when first asked for, since not every recipe asks."""
        return _UNIT.findall(self._text.lower())

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Characters of each unit."""
        return np.fromiter(map(len, self.units), np.int64, len(self.units))

    @cached_property
    def spaceless(self) -> bool:
        """Whether the text is mostly in a script without spaces: it has more such characters than words."""
        single = sum(1 for unit in self.units if len(unit) == 1 and _is_spaceless(unit))
        return 2 * single > len(self.units)

    def ngrams(self, n: int) -> npt.NDArray[np.uint64]:
        """A 64-bit hash of each of the ``len(self) - n + 1`` n-grams; none where the text is shorter."""
        hashes = self._hashes
        count = max(0, len(hashes) - n + 1)
        total = np.zeros(count, np.uint64)
        for j in range(n if count else 0):  # a polynomial in an odd base, modulo 2 ** 64
            total = total * _BASE + hashes[j : j + count]
        return total

    @cached_property
    def _hashes(self) -> npt.NDArray[np.uint64]:
        return np.fromiter(map(_hash, self.units), np.uint64, len(self.units))


@lru_cache(maxsize=2**17)
def _hash(unit: str) -> int:
    return int.from_bytes(hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=2**15)
def _is_spaceless(unit: str) -> bool:
    return unit >= _FIRST_SPACELESS and re.match(f"[{_SPACELESS}]", unit) is not None
