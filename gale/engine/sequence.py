"""One request while it runs: its tokens, its cache, and how its text leaves the engine."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Protocol

from torch import Tensor

from gale.engine.adapters import Adapter
from gale.engine.kv_cache import SequenceCache
from gale.engine.reading import Observer
from gale.engine.request import (
    Event,
    Finished,
    FinishReason,
    PromptScores,
    SamplingParams,
    TextDelta,
    TokenScore,
    Usage,
)
from gale.engine.sampler import Constraint, Sampler
from gale.engine.stop import StopScanner


class TextStream(Protocol):
    """What turns tokens into text as they come, such as :class:`gale.text.tokenizer.TokenStream`."""

    def push(self, token: int) -> str:
        """Text that has become certain with ``token``."""


class Sequence:
    """A prompt and the answer so far. ``emit`` is called with every event, from the engine's thread.

    ``tokens`` are those of the prompt and of the answer, an end token among them, and ``logprobs`` the answer's
    log-probabilities if they were asked for.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        room: int,
        end_tokens: Set[int],
        stream: TextStream,
        emit: Callable[[PromptScores | Event | Exception], None],
        constraint: Constraint | None = None,
        adapter: Adapter | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.cache: SequenceCache | None = None  # what the model has read of them; none while the sequence waits
        self.cached_tokens = 0  # of the prompt, copied from what others had read
        self.namespace = adapter and adapter.namespace  # keys and values are of use to those with the same only
        self.block_keys: list[int] = []  # see gale.engine.prefix_cache
        self.order = (params.priority, 0)
        self.sampler = Sampler(params, prompt, constraint)
        self.emit = emit
        self.params = params
        self.adapter = adapter
        self.observer = observer
        self.logprobs: list[float] = []
        self.cancelled = False
        self.finished = False
        self._prompt_read = False
        self._prompt_scores = [TokenScore(prompt[0], None)]
        self._limit = room if params.max_tokens is None else min(params.max_tokens, room)
        self.most_tokens = len(prompt) + self._limit + (observer.further_tokens if observer else 0)
        self._end_tokens = end_tokens | set(params.stop_token_ids)
        self._stream = stream
        self._stops = StopScanner(params.stop)

    @property
    def generated(self) -> list[int]:
        """The answer's token ids so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def unread(self) -> int:
        """Tokens that the model has yet to read; fewer than none where it has read drafts."""
        return len(self.tokens) - (self.cache.length if self.cache else 0)

    @property
    def scored(self) -> int:
        """Tokens of the prompt whose scores are known."""
        return len(self._prompt_scores)

    @property
    def usage(self) -> Usage:
        """What has been done for it so far. May be asked from any thread."""
        answer = len(self.tokens) - self.prompt_tokens
        cache = self.cache
        read = self.prompt_tokens if answer else min(cache.length, self.prompt_tokens) if cache else 0
        return Usage(read, answer, min(self.cached_tokens, read))

    def observe(self, hidden_KC: Tensor) -> None:
        """Show the observer, if there is one, what was just read; it may put other tokens behind the prompt."""
        if self.observer is not None and self.cache is not None:
            unread = self.observer.observe(hidden_KC, self.cache, self.tokens[self.cache.length :])
            self.tokens[self.cache.length :] = unread

    def read(self, scores: list[TokenScore]) -> None:
        """Take the scores of the prompt's next tokens, and finish after the last one if nothing is to be generated."""
        self._prompt_scores += scores
        if self._prompt_read or self.unread > 0:
            return
        self._prompt_read = True
        if self.params.prompt_logprobs:
            self.emit(PromptScores(tuple(self._prompt_scores)))
        if self._limit == 0:
            self.finish("length")

    def accept(self, token: int, score: TokenScore | None = None) -> None:
        """Take the model's next token: show its text, and finish where it ends the answer."""
        self.sampler.commit(token)
        self.tokens.append(token)
        if score is not None and score.logprob is not None:
            self.logprobs.append(score.logprob)
        reason: FinishReason | None = None
        if token in self._end_tokens:
            text, reason = self._stops.flush(), "stop"
        else:
            text = self._stops.push(self._stream.push(token))
            if self._stops.stopped:
                reason = "stop"
            elif self.sampler.complete:
                text, reason = text + self._stops.flush(), "stop"
            elif len(self.tokens) >= self.most_tokens:
                text, reason = text + self._stops.flush(), "length"
        if text or score is not None:
            self.emit(TextDelta(text, score))
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.finished = True
        usage = Usage(self.prompt_tokens, len(self.tokens) - self.prompt_tokens, self.cached_tokens)
        self.emit(Finished(reason, usage, self._stops.met))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.finished = True
        self.emit(error)
