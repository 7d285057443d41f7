"""The engine's heart: which tokens the model reads in each step (continuous batching with chunked prefill).

A step takes one new token of every answering sequence and, beside them, a bounded chunk of the prompts that are
still being read. So answers never wait longer for a long prompt than for one chunk of it (Yu et al. 2022, Agrawal
et al. 2023).
"""

from __future__ import annotations

import itertools
import time
from bisect import insort

import structlog
import torch
from torch import Tensor

from gale.engine.adapters import BatchAdapters
from gale.engine.kv_cache import Caches, OwnCaches, SequenceCache
from gale.engine.pace import Pace
from gale.engine.prefix_cache import PrefixCache
from gale.engine.request import EngineFailedError, EngineOverloadedError, EngineStats, GrammarError, TokenScore
from gale.engine.sampler import choose
from gale.engine.scores import score_rows
from gale.engine.sequence import Sequence
from gale.engine.speculation import Speculation
from gale.model.transformer import Decoder

# Prompt rows whose scores over the vocabulary are held at once: 64 rows of 150,000 tokens are 38 MB in fp32.
_SCORED_ROWS = 64
# Tokens that a sequence may go on for before there could be too little memory, where another is to start beside it.
_HEADROOM = 16
# Tokens of an answer for which there is room before keys and values are copied to a larger place.
_ANSWER_TOKENS = 128
# Rows of answers and drafts that a step may have; up to about here a linear layer waits for its weights anyway.
_DRAFT_ROWS = 32

log = structlog.get_logger()


class Batcher:
    """Runs sequences through ``model``: at most ``max_running`` at once, ``prefill_chunk`` prompt tokens a step.

    A sequence starts when its tokens so far fit into ``max_cached_tokens`` beside those of all that run. Where answers
    outgrow that, the least urgent and youngest sequence gives its memory back and waits; later all its tokens are read
    again, and its answer goes on as if nothing had been. One sequence always runs, however long. A more urgent sequence
    (a lower ``priority``) takes the place of a less urgent one. Keys and values lie in ``caches``; each sequence's
    in a piece of its own where none are given. With ``pace`` the chunk adapts to the time that answers take. With
    ``prefix_cache`` what others have read is copied where it can be; what is kept for that gives way first. With
    ``speculation`` answering sequences may go on by several tokens a step. None of that changes an answer.
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
        pace: Pace | None = None,
        prefix_cache: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        self._model = model
        weight = model.embed_tokens.weight
        self._device = weight.device
        self._caches = caches or OwnCaches(model.config, weight.dtype, weight.device)
        self._adapters = adapters or BatchAdapters(model)
        self._prefixes = PrefixCache(self._caches, enabled=prefix_cache)
        self._max_running = max_running
        self._max_cached_tokens = self._limit = max_cached_tokens
        self._prefill_chunk = prefill_chunk
        self._pace = pace
        self._speculation = speculation
        self._arrivals = itertools.count()
        self._running: list[Sequence] = []  # this and the next: the most urgent first, the oldest of those first
        self._waiting: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._waiting

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held for running sequences."""
        return sum(sequence.cache.length for sequence in self._running if sequence.cache)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys and values are kept in case that another sequence begins alike."""
        return self._prefixes.tokens

    def stats(self) -> EngineStats:
        """How busy it is. May be asked from any thread: what runs may be counted a step late."""
        running = list(self._running)
        caches = [sequence.cache for sequence in running]
        return EngineStats(
            waiting=len(self._waiting),
            running=len(running),
            cached_tokens=sum(cache.length for cache in caches if cache),
            kept_tokens=self.kept_tokens,
            most_cached_tokens=self._max_cached_tokens,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; among equally urgent ones they start in the order in which they came."""
        sequence.order = (sequence.params.priority, next(self._arrivals))
        insort(self._waiting, sequence, key=_order)

    def abandon(self, error: Exception) -> None:
        """Tell every sequence that it failed and forget them all."""
        for sequence in [*self._running, *self._waiting]:
            sequence.fail(error)
            self._release(sequence, keep=False)
        self._prefixes.shrink(0)
        self._forget_finished()

    @torch.inference_mode()
    def step(self) -> None:
        """Drop what was cancelled, admit what fits, read one batch of tokens and choose the next ones."""
        began = time.perf_counter()
        self._drop_cancelled()
        self._make_room()
        self._admit()
        plan = self._plan()
        drafts = self._draft([sequence for sequence, _ in plan if sequence.unread == 1 and sequence.observer is None])
        work = self._reserve([(sequence, count + len(drafts.get(sequence, ()))) for sequence, count in plan])
        if not work:
            return
        ids: list[int] = []
        positions: list[int] = []
        caches: list[SequenceCache] = []
        for sequence, count in work:
            cache = sequence.cache
            assert cache is not None
            caches.append(cache)
            ids += (sequence.tokens[cache.length : cache.length + count] + drafts.get(sequence, []))[:count]
            positions += range(cache.length, cache.length + count)
        attend = self._caches.attention(caches, [count for _, count in work])
        with self._adapters.applied((sequence.adapter, count) for sequence, count in work):
            hidden_NC = self._model(
                torch.tensor(ids, device=self._device), torch.tensor(positions, device=self._device), attend
            )
        sampled: list[tuple[Sequence, int]] = []
        low = 0
        for (sequence, count), cache in zip(work, caches, strict=True):
            scores = self._score_prompt(sequence, hidden_NC[low : low + count], cache.length)
            cache.advance(count)
            try:
                sequence.observe(hidden_NC[low : low + count])
                sequence.read(scores)
            except Exception as error:  # what is wrong with one request must not end the others
                sequence.fail(EngineFailedError("The engine failed while reading."))
                log.exception("reading_failed", error=str(error))
            low += count
            if sequence.unread <= 0 and not sequence.finished:  # the last token's scores are the next token's
                sampled.append((sequence, low - 1 - len(drafts.get(sequence, ()))))
        if sampled:
            self._answer(sampled, drafts, hidden_NC)
        if self._pace:
            prompts = [count for sequence, count in work if count > 1 and sequence not in drafts]
            self._pace.note(len(work) - len(prompts), sum(prompts), time.perf_counter() - began)
        self._forget_finished()

    def _answer(
        self, sampled: list[tuple[Sequence, int]], drafts: dict[Sequence, list[int]], hidden_NC: Tensor
    ) -> None:
        """Give each sequence the token that follows its row, and those that follow its drafts while they are right."""
        rows = [row + place for sequence, row in sampled for place in range(len(drafts.get(sequence, ())) + 1)]
        logits_SV = self._model.logits(hidden_NC if len(rows) == len(hidden_NC) else hidden_NC[rows]).cpu()
        lengths = [len(sequence.tokens) for sequence, _ in sampled]
        row_of = {row: place for place, row in enumerate(rows)}
        going = sampled
        while going:
            own = [row_of[row] for _, row in going]
            self._choose([sequence for sequence, _ in going], logits_SV if len(own) == len(rows) else logits_SV[own])
            going = [
                (sequence, row + 1)
                for (sequence, row) in going
                if not sequence.finished and self._was_right(sequence, drafts.get(sequence, []))
            ]
        for (sequence, _), length in zip(sampled, lengths, strict=True):
            if self._speculation and sequence in drafts and sequence.cache:
                sequence.cache.truncate(len(sequence.tokens) - 1)
                self._speculation.verified(sequence, len(drafts[sequence]), len(sequence.tokens) - length - 1)

    @staticmethod
    def _was_right(sequence: Sequence, drafts: list[int]) -> bool:
        """Whether the newest token is the next draft."""
        assert sequence.cache is not None
        place = len(sequence.tokens) - 1 - (sequence.cache.length - len(drafts))
        return place < len(drafts) and sequence.tokens[-1] == drafts[place]

    def _draft(self, answering: list[Sequence]) -> dict[Sequence, list[int]]:
        """Tokens to read on trust, as far as there is room for them."""
        if self._speculation is None:
            return {}
        room = self._limit - self._tokens()
        drafts = self._speculation.drafts(answering, min(_DRAFT_ROWS - len(answering), room))
        self._prefixes.shrink(room - sum(map(len, drafts.values())))
        return drafts

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
            except GrammarError as error:
                sequence.fail(error)
            except Exception as error:  # what is wrong with one answer must not end the others
                sequence.fail(EngineFailedError("The engine failed while answering."))
                log.exception("answer_failed", error=str(error))

    def _score_prompt(self, sequence: Sequence, hidden_KC: Tensor, first: int) -> list[TokenScore]:
        """Scores of the prompt's tokens that follow K just read ones, of which the ``first`` has that place.

        Nothing where nobody asked, and none twice: what a sequence lost its memory for is read again.
        """
        if not sequence.params.prompt_logprobs:
            return []
        scores: list[TokenScore] = []
        known = sequence.tokens[: min(first + len(hidden_KC) + 1, sequence.prompt_tokens)]
        for low in range(max(first + 1, sequence.scored), len(known), _SCORED_ROWS):
            tokens = known[low : low + _SCORED_ROWS]
            row = low - first - 1
            logits_RV = self._model.logits(hidden_KC[row : row + len(tokens)])
            scores += score_rows(logits_RV, tokens, sequence.params.logprobs or 0)
        return scores

    def _make_room(self) -> None:
        """Take memory back from the least urgent where this step would need more than there is."""
        while len(self._running) > 1 and self._tokens() > self._limit:
            self._preempt(self._running[-1])
        self._prefixes.shrink(self._limit - self._tokens())

    def _tokens(self) -> int:
        """Tokens that the running sequences have to hold in order to go on."""
        return sum(len(sequence.tokens) for sequence in self._running)

    def _admit(self) -> None:
        """Start what waits, in order, as far as there is room."""
        for sequence in self._waiting[: self._max_running]:
            if self._prefixes.awaits(sequence):
                continue
            while not self._fits(sequence):
                last = self._running[-1]
                if last.params.priority <= sequence.params.priority:
                    return
                self._preempt(last)
            self._waiting.remove(sequence)
            self._prefixes.begin(sequence, self._limit - self._tokens() - len(sequence.tokens))
            insort(self._running, sequence, key=_order)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a sequence may start beside those that run."""
        if not self._running:
            self._limit = self._max_cached_tokens
            return True
        near = sum(min(each.most_tokens, len(each.tokens) + _HEADROOM) for each in [*self._running, sequence])
        return len(self._running) < self._max_running and near <= self._limit

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, without its cache."""
        self._release(sequence, keep=False)
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_order)

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Sequences of this step with how many tokens each reads; prompts share one chunk, the most urgent first."""
        answering = sum(sequence.unread == 1 for sequence in self._running)
        work, budget = [], self._pace.chunk(answering) if self._pace else self._prefill_chunk
        for sequence in self._running:
            if sequence.unread == 1:
                work.append((sequence, 1))
            elif budget > 0:
                count = min(sequence.unread, budget)
                work.append((sequence, count))
                budget -= count
        return work

    def _reserve(self, work: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """What of ``work`` there is memory for; the rest waits until others have ended. One that is alone fails."""
        place = 0
        while place < len(work):
            sequence, count = work[place]
            assert sequence.cache is not None
            try:
                # The whole prompt and a beginning of the answer.
                left = sequence.most_tokens - sequence.cache.length
                sequence.cache.reserve(count, expected=min(sequence.unread + _ANSWER_TOKENS, left))
                place += 1
            except (MemoryError, RuntimeError) as error:  # torch has no name of its own for it on a CPU
                log.warning("no_memory_for_keys_and_values", cached_tokens=self.cached_tokens, error=str(error))
                last = self._running[-1]
                if self._prefixes.tokens:
                    self._prefixes.shrink(0)
                    continue
                if len(self._running) == 1:
                    last.fail(EngineOverloadedError("There is no memory left for this request; try again later."))
                    self._forget_finished()
                    return []
                self._limit = self.cached_tokens  # until nothing runs
                self._preempt(last)
                work = [item for item in work if item[0] is not last]
        return work

    def _drop_cancelled(self) -> None:
        for sequence in [*self._running, *self._waiting]:
            if sequence.cancelled:
                sequence.finish("cancelled")
        self._forget_finished()

    def _forget_finished(self) -> None:
        for sequence in self._running:
            if sequence.finished:
                self._release(sequence, keep=True)
        self._running = [sequence for sequence in self._running if not sequence.finished]
        self._waiting = [sequence for sequence in self._waiting if not sequence.finished]

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence's memory back."""
        self._prefixes.end(sequence, keep=keep)
        if self._speculation:
            self._speculation.forget(sequence)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
