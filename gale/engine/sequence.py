"""One request while it runs: its tokens, its cache, and how its text leaves the engine."""

from __future__ import annotations

from collections.abc import Callable, Set

from gale.engine.kv_cache import SequenceCache
from gale.engine.request import Event, Finished, FinishReason, SamplingParams, TextDelta, Usage
from gale.engine.sampler import Sampler
from gale.engine.stop import StopScanner
from gale.text.tokenizer import TokenStream


class Sequence:
    """A prompt and the answer so far. ``emit`` is called with every event, from the engine's thread."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        room: int,
        end_tokens: Set[int],
        stream: TokenStream,
        emit: Callable[[Event | Exception], None],
    ) -> None:
        self.pending = prompt  # tokens the model has not read yet
        self.cache: SequenceCache | None = None  # given when the sequence is admitted
        self.sampler = Sampler(params)
        self.emit = emit
        self.cancelled = False
        self.finished = False
        self._prompt_tokens = len(prompt)
        self._generated = 0
        self._limit = room if params.max_tokens is None else min(params.max_tokens, room)
        self.most_tokens = len(prompt) + self._limit
        self._end_tokens = end_tokens
        self._stream = stream
        self._stops = StopScanner(params.stop)

    def accept(self, token: int) -> None:
        """Take the model's next token: show its text, and finish where it ends the answer."""
        self._generated += 1
        if token in self._end_tokens:
            self._show(self._stops.flush())
            self.finish("stop")
            return
        self._show(self._stops.push(self._stream.push(token)))
        if self._stops.stopped:
            self.finish("stop")
        elif self._generated >= self._limit:
            self._show(self._stops.flush())
            self.finish("length")
        else:
            self.pending = [token]

    def finish(self, reason: FinishReason) -> None:
        """End the answer."""
        self.finished = True
        self.emit(Finished(reason, Usage(self._prompt_tokens, self._generated)))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.finished = True
        self.emit(error)

    def _show(self, text: str) -> None:
        if text:
            self.emit(TextDelta(text))
