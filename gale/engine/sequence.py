"""One request while it runs: its tokens, its cache, and how its text leaves the engine."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Protocol

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
from gale.engine.sampler import Sampler
from gale.engine.stop import StopScanner


class TextStream(Protocol):
    """What turns tokens into text as they come, such as :class:`gale.text.tokenizer.TokenStream`."""

    def push(self, token: int) -> str:
        """Text that has become certain with ``token``."""


class Sequence:
    """A prompt and the answer so far. ``emit`` is called with every event, from the engine's thread.

    ``generated`` holds the answer's token ids, an end token among them, and ``logprobs`` their log-probabilities if
    they were asked for.
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
        adapter: Adapter | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.pending = prompt  # tokens the model has not read yet
        self.cache: SequenceCache | None = None  # given when the sequence is admitted
        self.sampler = Sampler(params)
        self.emit = emit
        self.params = params
        self.adapter = adapter
        self.observer = observer
        self.generated: list[int] = []
        self.logprobs: list[float] = []
        self.cancelled = False
        self.finished = False
        self._prompt_tokens = len(prompt)
        self._prompt_scores = [TokenScore(prompt[0], None)]
        self._limit = room if params.max_tokens is None else min(params.max_tokens, room)
        self.most_tokens = len(prompt) + self._limit + (observer.further_tokens if observer else 0)
        self._end_tokens = end_tokens
        self._stream = stream
        self._stops = StopScanner(params.stop)

    def read(self, scores: list[TokenScore]) -> None:
        """Take the scores of the prompt's next tokens, and finish after the last one if nothing is to be generated."""
        self._prompt_scores += scores
        if self.pending or self.generated:
            return
        if self.params.prompt_logprobs:
            self.emit(PromptScores(tuple(self._prompt_scores)))
        if self._limit == 0:
            self.finish("length")

    def accept(self, token: int, score: TokenScore | None = None) -> None:
        """Take the model's next token: show its text, and finish where it ends the answer."""
        self.generated.append(token)
        if score is not None and score.logprob is not None:
            self.logprobs.append(score.logprob)
        reason: FinishReason | None = None
        if token in self._end_tokens:
            text, reason = self._stops.flush(), "stop"
        else:
            text = self._stops.push(self._stream.push(token))
            if self._stops.stopped:
                reason = "stop"
            elif len(self.generated) >= self._limit:
                text, reason = text + self._stops.flush(), "length"
        if text or score is not None:
            self.emit(TextDelta(text, score))
        if reason is not None:
            self.finish(reason)
        else:
            self.pending = [token]

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.finished = True
        self.emit(Finished(reason, Usage(self._prompt_tokens, len(self.generated))))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.finished = True
        self.emit(error)
