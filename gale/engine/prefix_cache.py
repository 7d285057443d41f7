"""What has been read already: where a prompt begins as another sequence does, its keys and values are copied.

Conversations repeat what was said, and applications their instructions. The caches of finished sequences are kept
while there is memory, the least recently used going first, and those of running ones are looked at too: so several
answers to one prompt read it once. Tokens are found by blocks, each block's hash chained to that of the one before it
(as in Kwon et al. 2023), and then compared one by one, so a collision costs nothing but a miss. Unlike pages, copies
leave each sequence in one piece, which is what makes reading it fast on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import islice

from gale.engine.kv_cache import Caches, SequenceCache
from gale.engine.sequence import Sequence

BLOCK = 16
# Of those that share a block, only the newest are compared: the others cannot have much more in common.
_COMPARED = 4


@dataclass(eq=False, slots=True)
class _Entry:
    """A sequence whose beginning may be copied; ``tokens`` may be longer than what its cache holds so far."""

    tokens: list[int]
    namespace: Hashable
    cache: SequenceCache
    order: tuple[int, int] | None  # of a running sequence
    keys: list[int] = field(default_factory=list)


class PrefixCache:
    """Gives sequences their caches, begun where possible, and keeps those of sequences that have ended.

    Not ``enabled``, it only passes them on. Sequences share nothing across namespaces, such as those of adapters.
    """

    def __init__(self, caches: Caches, *, enabled: bool) -> None:
        self._caches = caches
        self._enabled = enabled
        self._running: dict[SequenceCache, _Entry] = {}
        self._kept: dict[SequenceCache, _Entry] = {}  # the least recently used first
        self._by_block: dict[int, dict[_Entry, None]] = {}

    @property
    def tokens(self) -> int:
        """Tokens kept of sequences that have ended."""
        return sum(cache.length for cache in self._kept)

    def awaits(self, sequence: Sequence) -> bool:
        """Whether somebody older or more urgent is reading what ``sequence`` could soon copy."""
        found = self._find(sequence)
        have = max((min(common, entry.cache.length) for entry, common in found), default=0)
        return any(
            entry.order is not None
            and entry.order < sequence.order
            and have < min(common, len(entry.tokens) - 1)  # its last token it reads only in order to go on
            for entry, common in found
        )

    def begin(self, sequence: Sequence, room: int) -> None:
        """Give ``sequence`` a cache, after which the kept ones hold at most ``room`` tokens."""
        found = self._find(sequence)
        entry, tokens = max(
            ((entry, min(common, entry.cache.length)) for entry, common in found),
            key=lambda each: each[1],
            default=(None, 0),
        )
        self.shrink(room, spare=entry)
        if entry is not None and entry.order is None:
            self._kept[entry.cache] = self._kept.pop(entry.cache)  # the most recently used
            if tokens == entry.cache.length or self.tokens > room:  # it is all of it, or there is no room for two
                self._forget(entry)
                sequence.cache = entry.cache
                sequence.cache.truncate(tokens)
                sequence.cache.trim(len(sequence.tokens))  # what is counted is tokens, so no memory may hide behind few
        if sequence.cache is None:
            sequence.cache = self._caches.take()
            if entry is not None:
                with contextlib.suppress(MemoryError, RuntimeError):  # no memory for it: then all is read again
                    sequence.cache.copy_from(entry.cache, tokens)
        if len(sequence.tokens) == sequence.prompt_tokens:
            sequence.cached_tokens = sequence.cache.length
        if self._enabled:
            self._note(sequence, _Entry(sequence.tokens, sequence.namespace, sequence.cache, sequence.order))

    def end(self, sequence: Sequence, *, keep: bool) -> None:
        """Take the cache of a sequence back, to ``keep`` it or to free its memory."""
        cache, sequence.cache = sequence.cache, None
        if cache is None:
            return
        if cache in self._running:
            self._forget(self._running[cache])
        if self._enabled and keep and cache.length >= BLOCK:
            new = _Entry(sequence.tokens[: cache.length], sequence.namespace, cache, None)
            for old in list(self._kept.values()):  # what is but a beginning of this one is of no more use
                if old.namespace == new.namespace and new.tokens[: len(old.tokens)] == old.tokens:
                    self._forget(old)
                    self._caches.give_back(old.cache)
            self._note(sequence, new)
        else:
            self._caches.give_back(cache)

    def shrink(self, tokens: int, spare: _Entry | None = None) -> None:
        """Free kept caches until they hold at most ``tokens``, except ``spare``."""
        excess = self.tokens - tokens
        for entry in [entry for entry in self._kept.values() if entry is not spare]:
            if excess <= 0:
                return
            excess -= entry.cache.length
            self._forget(entry)
            self._caches.give_back(entry.cache)

    def _find(self, sequence: Sequence) -> list[tuple[_Entry, int]]:
        """Those that begin as ``sequence`` does, with the number of tokens in common that are of use to it."""
        if not self._enabled or (sequence.observer is not None and sequence.observer.whole):
            return []
        # The last token must be read in any case, and so must those whose scores are asked for. An observer needs to
        # see what it put behind the prompt itself, also where that is read again.
        most = sequence.prompt_tokens if sequence.observer is not None else len(sequence.tokens)
        most = min(most, sequence.scored) if sequence.params.prompt_logprobs else most
        for key in reversed(_chain(sequence)):
            if entries := self._by_block.get(key):
                found = [
                    (entry, min(_common(entry.tokens, sequence.tokens), most - 1))
                    for entry in islice(reversed(entries), _COMPARED)
                    if entry.namespace == sequence.namespace
                ]
                return [(entry, common) for entry, common in found if common >= BLOCK]
        return []

    def _note(self, sequence: Sequence, entry: _Entry) -> None:
        (self._kept if entry.order is None else self._running)[entry.cache] = entry
        entry.keys = list(dict.fromkeys(_chain(sequence)[: len(entry.tokens) // BLOCK]))
        for key in entry.keys:
            self._by_block.setdefault(key, {})[entry] = None

    def _forget(self, entry: _Entry) -> None:
        (self._kept if entry.order is None else self._running).pop(entry.cache)
        for key in entry.keys:
            entries = self._by_block[key]
            del entries[entry]
            if not entries:
                del self._by_block[key]


def _chain(sequence: Sequence) -> list[int]:
    """A hash for each whole block that stands for all tokens up to its end; those known already are not made anew."""
    keys, tokens = sequence.block_keys, sequence.tokens
    for low in range(len(keys) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        keys.append(hash((keys[-1] if keys else hash(sequence.namespace), *tokens[low : low + BLOCK])))
    return keys


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection, since slices are compared much faster than single tokens
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
