"""Tokens guessed ahead and verified in one step, since a step of a few rows costs hardly more than one of one row.

At each place the token is chosen as ever, from the model's own scores with the request's own random numbers; a draft
only stands while it is what was chosen. So answers are the same with and without, sampled ones too. That is simpler
than the rejection sampling of Leviathan et al. 2023, at the price of some more drafts refused where the temperature is
high.
"""

from __future__ import annotations

from typing import Protocol

import structlog
import torch

from gale.engine.kv_cache import OwnCaches, SequenceCache
from gale.engine.sampler import likeliest_tokens
from gale.engine.sequence import Sequence
from gale.model.transformer import Decoder

log = structlog.get_logger()

_FIRST_LENGTH = 3
_MOST = 8  # drafts of one sequence
_LONGEST_PAUSE = 32
_NGRAMS = (3, 2)


class Drafter(Protocol):
    """What guesses how sequences go on."""

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many tokens for each sequence, or none."""

    def verified(self, sequence: Sequence) -> None:
        """A sequence has taken what it takes of its drafts, and one token more."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended or lost its memory."""


class Speculation:
    """How far to guess for whom: further where guesses come true, and with pauses where they do not."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._lengths: dict[Sequence, _Length] = {}

    def drafts(self, sequences: list[Sequence], rows: int) -> dict[Sequence, list[int]]:
        """Guesses for answering ``sequences``, at most ``rows`` tokens in all."""
        wanted: list[tuple[Sequence, int]] = []
        for sequence in sequences:
            length = self._lengths.setdefault(sequence, _Length()).next()
            # The last token that is allowed is chosen, not read.
            count = min(length, rows, sequence.most_tokens - len(sequence.tokens) - 1)
            if count > 0:
                wanted.append((sequence, count))
                rows -= count
        try:
            proposed = self._drafter.propose(wanted) if wanted else []
        except (MemoryError, RuntimeError) as error:  # no memory for guesses is no reason to fail
            log.warning("no_drafts", error=str(error))
            for sequence, _ in wanted:
                self.forget(sequence)
            return {}
        return {sequence: tokens for (sequence, _), tokens in zip(wanted, proposed, strict=True) if tokens}

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn how many of a sequence's drafts were right."""
        self._lengths[sequence].learn(drafted, accepted)
        self._drafter.verified(sequence)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended or lost its memory."""
        self._lengths.pop(sequence, None)
        self._drafter.forget(sequence)


class _Length:
    """How many tokens to guess next: twice as many after a full success, and none for a while after failures."""

    def __init__(self) -> None:
        self._length = _FIRST_LENGTH
        self._misses = 0
        self._pause = 0

    def next(self) -> int:
        self._pause = max(self._pause - 1, 0)
        return 0 if self._pause else self._length

    def learn(self, drafted: int, accepted: int) -> None:
        if accepted == drafted:
            self._length = min(2 * self._length, _MOST)
        else:
            self._length = max(accepted, 1)
        self._misses = 0 if accepted else self._misses + 1
        self._pause = min(2**self._misses, _LONGEST_PAUSE) if self._misses else 0


class NgramDrafter:
    """What followed the last time that the newest tokens stood together (prompt lookup, Saxena 2023)."""

    def __init__(self) -> None:
        # Where the continuation of each run of tokens begins, and how many tokens of the sequence have been looked at.
        self._places: dict[Sequence, tuple[dict[tuple[int, ...], int], int]] = {}

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """See :class:`Drafter`."""
        return [self._continue(sequence, count) for sequence, count in wanted]

    def _continue(self, sequence: Sequence, count: int) -> list[int]:
        tokens = sequence.tokens
        places, seen = self._places.get(sequence, ({}, 0))
        for end in range(seen, len(tokens)):
            for size in _NGRAMS:
                if end >= size:
                    places[tuple(tokens[end - size : end])] = end
        self._places[sequence] = places, len(tokens)
        for size in _NGRAMS:
            if (start := places.get(tuple(tokens[-size:]))) is not None:
                draft: list[int] = []
                for place in range(start, start + count):  # beyond the end it goes round and round
                    draft.append(tokens[place] if place < len(tokens) else draft[place - len(tokens)])
                return draft
        return []

    def verified(self, sequence: Sequence) -> None:
        """Nothing to do: tokens are looked at when they are needed."""

    def forget(self, sequence: Sequence) -> None:
        """See :class:`Drafter`."""
        self._places.pop(sequence, None)


class DraftModel:
    """A smaller model with the same vocabulary, which guesses greedily; it reads prompts ``chunk`` tokens a step."""

    def __init__(self, model: Decoder, *, chunk: int = 256) -> None:
        self._model = model
        self._chunk = chunk
        self._device = model.embed_tokens.weight.device
        self._own = OwnCaches(model.config, model.embed_tokens.weight.dtype, self._device)
        self._caches: dict[Sequence, SequenceCache] = {}

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """See :class:`Drafter`. What it has not read to the end yet it has no guess for."""
        budget = self._chunk
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence, _ in wanted}
        counts = dict(wanted)
        reading: list[tuple[Sequence, list[int]]] = []
        for sequence, _ in wanted:
            cache = self._caches.setdefault(sequence, self._own.take())
            if tokens := sequence.tokens[cache.length : cache.length + budget]:
                reading.append((sequence, tokens))
                budget -= len(tokens)
        while reading:
            guesses = self._read(reading)
            ready = [
                (sequence, token)
                for (sequence, _), token in zip(reading, guesses, strict=True)
                if self._caches[sequence].length >= len(sequence.tokens)
            ]
            for sequence, token in ready:
                drafts[sequence].append(token)
            reading = [(sequence, [token]) for sequence, token in ready if len(drafts[sequence]) < counts[sequence]]
        return list(drafts.values())

    def _read(self, reading: list[tuple[Sequence, list[int]]]) -> list[int]:
        """The likeliest token after those that each sequence reads."""
        caches, counts = [self._caches[sequence] for sequence, _ in reading], [len(tokens) for _, tokens in reading]
        positions: list[int] = []
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(count)
            positions += range(cache.length, cache.length + count)
        hidden_NC = self._model(
            torch.tensor([token for _, tokens in reading for token in tokens], device=self._device),
            torch.tensor(positions, device=self._device),
            self._own.attention(caches, counts),
        )
        for cache, count in zip(caches, counts, strict=True):
            cache.advance(count)
        last = torch.tensor(counts, device=self._device).cumsum(0) - 1
        guesses: list[int] = likeliest_tokens(self._model.logits(hidden_NC[last])).tolist()
        return guesses

    def verified(self, sequence: Sequence) -> None:
        """Forget the drafts that were wrong: right is all but the newest token, which none of them was."""
        self._caches[sequence].truncate(len(sequence.tokens) - 1)

    def forget(self, sequence: Sequence) -> None:
        """See :class:`Drafter`."""
        self._caches.pop(sequence, None)
