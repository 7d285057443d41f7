"""What a model answers by reading alone: texts as vectors, and the probabilities of given answers.

Both go through the batcher as any prompt does, chunk by chunk beside what is being written, and both look at hidden
states as they come, as the :class:`Observer` of their sequence.

Shape suffixes: K tokens just read, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gale.core.model_folder import read_json
from gale.engine.kv_cache import SequenceCache
from gale.engine.request import Pooling


class Observer(Protocol):
    """Looks at what the model makes of a sequence's tokens, in the engine's thread.

    ``whole`` says that it needs every token's hidden state, so that none may be skipped because its keys and values are
    known already; ``further_tokens`` is what the cache must have room for behind the prompt.
    """

    whole: bool
    further_tokens: int

    def observe(self, hidden_KC: Tensor, cache: SequenceCache, pending: list[int]) -> list[int]:
        """Take the K tokens that were read last (``cache`` ends behind them) and say what is to be read next.

        That is ``pending``, what is left of the prompt, or where nothing is left, more of the observer's own.
        """


class Pool:
    """The mean of a text's hidden states, or the last one."""

    further_tokens = 0

    def __init__(self, pooling: Pooling) -> None:
        self.whole = pooling == "mean"
        self._pooled_C = torch.zeros(0)
        self._count = 1

    def observe(self, hidden_KC: Tensor, cache: SequenceCache, pending: list[int]) -> list[int]:
        """See :meth:`Observer.observe`."""
        if not self.whole:
            self._pooled_C = hidden_KC[-1].double()
        else:
            # In fp64, so that it makes no difference where a text was cut into chunks.
            sum_C = hidden_KC.double().sum(0)
            begins = cache.length == len(hidden_KC)
            self._pooled_C = sum_C if begins else self._pooled_C + sum_C
            self._count = cache.length
        return pending

    def vector(self, *, normalise: bool, dimensions: int | None) -> list[float]:
        """The pooled vector in fp32, cut to its first ``dimensions`` before it is scaled to length 1."""
        vector_C = (self._pooled_C / self._count)[:dimensions]
        vector: list[float] = (F.normalize(vector_C, dim=0) if normalise else vector_C).float().tolist()
        return vector


class LabelScorer:
    """Log-probabilities of several continuations of one prompt, which is read once.

    The last token of the prompt scores every label's first token. Labels of several tokens are read behind the prompt
    one after another, each from where the prompt ended; beginnings that labels share are read as often as they branch.
    """

    whole = False

    def __init__(self, prompt_tokens: int, labels: list[list[int]], logits: Callable[[Tensor], Tensor]) -> None:
        self._labels = [tuple(label) for label in labels]
        self._prompt_tokens = prompt_tokens
        self._logits = logits
        # What may follow each beginning, and the beginnings to read so that all of them have been read.
        self._next: dict[tuple[int, ...], dict[int, float]] = {}
        for label in self._labels:
            for place, token in enumerate(label):
                self._next.setdefault(label[:place], {})[token] = 0.0
        inner = sorted(self._next)
        self._paths = [
            path
            for path, following in zip(inner, [*inner[1:], ()], strict=True)
            if path and following[: len(path)] != path
        ]
        self.further_tokens = max(map(len, inner))
        self.label_tokens = sum(map(len, self._paths))

    def observe(self, hidden_KC: Tensor, cache: SequenceCache, pending: list[int]) -> list[int]:
        """See :meth:`Observer.observe`."""
        behind = cache.length - self._prompt_tokens  # tokens of a path
        if behind < 0:
            return pending
        path = self._paths[0] if behind else ()
        rows = min(len(hidden_KC), behind + 1)
        for row, hidden_C in enumerate(hidden_KC[-rows:]):  # one by one: of a wide vocabulary many would not fit
            following = self._next.get(path[: behind + 1 - rows + row], {})
            if following:
                logprobs_V = torch.log_softmax(self._logits(hidden_C[None])[0].float(), dim=-1)
                tokens = torch.tensor(list(following), device=logprobs_V.device)
                following.update(zip(following, logprobs_V[tokens].tolist(), strict=True))
        if pending:
            return pending
        if behind:
            del self._paths[0]
        # Also at the end: nothing but the prompt is left behind.
        cache.truncate(self._prompt_tokens)
        return list(self._paths[0]) if self._paths else []

    def logprobs(self) -> list[float]:
        """The sum over each label's tokens."""
        return [sum(self._next[label[:place]][token] for place, token in enumerate(label)) for label in self._labels]


def own_pooling(folder: Path | None) -> Pooling:
    """How a model folder pools, by the file that sentence-transformers writes; the mean where it does not say."""
    settings = read_json(folder / "1_Pooling" / "config.json") if folder is not None else {}
    return "last" if settings.get("pooling_mode_lasttoken") is True else "mean"
