"""The engine's heart: which tokens the model reads in each step (continuous batching with chunked prefill).

A step takes one new token of every answering sequence and, beside them, a bounded chunk of the oldest prompt that is
still being read. So answers never wait longer for a long prompt than for one chunk of it (Yu et al. 2022, Agrawal
et al. 2023).
"""

from __future__ import annotations

from collections import deque

import structlog
import torch
from torch import Tensor

from gale.engine.adapters import BatchAdapters
from gale.engine.kv_cache import Caches, OwnCaches, SequenceCache
from gale.engine.request import EngineFailedError, TokenScore
from gale.engine.sampler import choose
from gale.engine.scores import score_rows
from gale.engine.sequence import Sequence
from gale.model.transformer import Decoder

# Prompt rows whose scores over the vocabulary are held at once: 64 rows of 150,000 tokens are 38 MB in fp32.
_SCORED_ROWS = 64

log = structlog.get_logger()


class Batcher:
    """Runs sequences through ``model``: at most ``max_running`` at once, ``prefill_chunk`` prompt tokens a step.

    A sequence starts only when all it may come to hold fits into ``max_cached_tokens`` beside those running, so the
    cache can never run out in the middle of an answer. One sequence always runs, however long. Keys and
    values lie in ``caches``; each sequence's in a piece of its own where none are given.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_running: int,
        max_cached_tokens: int,
        prefill_chunk: int,
        caches: Caches | None = None,
        adapters: BatchAdapters | None = None,
    ) -> None:
        self._model = model
        weight = model.embed_tokens.weight
        self._device = weight.device
        self._caches = caches or OwnCaches(model.config, weight.dtype, weight.device)
        self._adapters = adapters or BatchAdapters(model)
        self._max_running = max_running
        self._max_cached_tokens = max_cached_tokens
        self._prefill_chunk = prefill_chunk
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; sequences start in the order in which they came."""
        self._waiting.append(sequence)

    def abandon(self, error: Exception) -> None:
        """Tell every sequence that it failed and forget them all."""
        for sequence in [*self._running, *self._waiting]:
            sequence.fail(error)
        self._forget_finished()
        self._waiting.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """Drop what was cancelled, admit what fits, read one batch of tokens and choose the next ones."""
        self._drop_cancelled()
        self._admit()
        work = self._plan()
        if not work:
            return
        ids: list[int] = []
        positions: list[int] = []
        caches: list[SequenceCache] = []
        for sequence, count in work:
            cache = sequence.cache
            assert cache is not None
            cache.reserve(count)
            caches.append(cache)
            ids += sequence.pending[:count]
            positions += range(cache.length, cache.length + count)
        attend = self._caches.attention(caches, [count for _, count in work])
        with self._adapters.applied((sequence.adapter, count) for sequence, count in work):
            hidden_NC = self._model(
                torch.tensor(ids, device=self._device), torch.tensor(positions, device=self._device), attend
            )
        sampled: list[tuple[Sequence, int]] = []
        row = -1
        for (sequence, count), cache in zip(work, caches, strict=True):
            low, row = row + 1, row + count
            cache.advance(count)
            known = sequence.pending[1 : count + 1]
            sequence.pending = sequence.pending[count:]
            if sequence.observer is not None:
                sequence.pending = sequence.observer.observe(hidden_NC[low : row + 1], cache, sequence.pending)
            sequence.read(self._score_prompt(sequence, hidden_NC[low : low + len(known)], known))
            if not sequence.pending and not sequence.finished:  # the last token's scores are the next token's
                sampled.append((sequence, row))
        if sampled:
            logits_SV = self._model.logits(hidden_NC[[row for _, row in sampled]]).float().cpu()
            self._choose([sequence for sequence, _ in sampled], logits_SV)
        self._forget_finished()

    def _choose(self, sequences: list[Sequence], logits_SV: Tensor) -> None:
        """Give each sequence its next token, with its score where one is asked for."""
        tokens = choose([sequence.sampler for sequence in sequences], logits_SV)
        scores: dict[int, TokenScore] = {}
        for top in {sequence.params.logprobs for sequence in sequences} - {None}:
            rows = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs == top]
            logits_RV = logits_SV if len(rows) == len(sequences) else logits_SV[rows]
            scores |= zip(rows, score_rows(logits_RV, [tokens[row] for row in rows], top or 0), strict=True)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            try:
                sequence.accept(token, scores.get(row))
            except Exception as error:  # what is wrong with one answer must not end the others
                sequence.fail(EngineFailedError("The engine failed while answering."))
                log.exception("answer_failed", error=str(error))

    def _score_prompt(self, sequence: Sequence, hidden_KC: Tensor, known: list[int]) -> list[TokenScore]:
        """The scores of the ``known`` tokens that follow K tokens just read; nothing where nobody asked."""
        if not sequence.params.prompt_logprobs:
            return []
        scores: list[TokenScore] = []
        for low in range(0, len(known), _SCORED_ROWS):
            logits_RV = self._model.logits(hidden_KC[low : low + _SCORED_ROWS])
            scores += score_rows(logits_RV, known[low : low + _SCORED_ROWS], sequence.params.logprobs or 0)
        return scores

    def _admit(self) -> None:
        """Start what waits, in order, as far as there is room."""
        held = sum(sequence.most_tokens for sequence in self._running)
        while self._waiting and len(self._running) < self._max_running:
            held += self._waiting[0].most_tokens
            if self._running and held > self._max_cached_tokens:
                return
            sequence = self._waiting.popleft()
            sequence.cache = self._caches.take()
            self._running.append(sequence)

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Sequences of this step with how many tokens each reads; prompts share one chunk, oldest first."""
        work, budget = [], self._prefill_chunk
        for sequence in self._running:
            if len(sequence.pending) == 1:
                work.append((sequence, 1))
            elif budget > 0:
                count = min(len(sequence.pending), budget)
                work.append((sequence, count))
                budget -= count
        return work

    def _drop_cancelled(self) -> None:
        for sequence in [*self._running, *self._waiting]:
            if sequence.cancelled:
                sequence.finish("cancelled")
        self._forget_finished()
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.finished)

    def _forget_finished(self) -> None:
        for sequence in self._running:
            if sequence.finished and sequence.cache:
                self._caches.give_back(sequence.cache)
        self._running = [sequence for sequence in self._running if not sequence.finished]
