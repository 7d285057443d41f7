"""Sequences whose events are kept, run through a batcher of the test's own choosing."""

from __future__ import annotations

from typing import Any

import torch

from gale.engine.batcher import Batcher
from gale.engine.request import Event, Finished, PromptScores, SamplingParams, TextDelta
from gale.engine.sequence import Sequence
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import make_model

# Wide enough that bf16 products have the same bits whatever the number of rows: torch leaves products of 4096
# numbers and less to another routine than wider ones.
BF16_SHAPE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "heads": 4, "head_dim": 32}


def make_bf16_model(tokenizer: Tokenizer, **changes: Any) -> Decoder:
    return make_model(tokenizer, **{**BF16_SHAPE, **changes}).to(torch.bfloat16)


class Recorded(Sequence):
    """A sequence that keeps its events."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], **options: Any) -> None:
        self.events: list[PromptScores | Event | Exception] = []
        own = {name: options.pop(name) for name in ("room", "end_tokens", "constraint", "adapter") if name in options}
        super().__init__(
            list(prompt),
            SamplingParams(**options),
            **{"room": 600, "end_tokens": frozenset(), **own},
            stream=tokenizer.stream(),
            emit=self.events.append,
        )

    @property
    def answer(self) -> list[object]:
        """What a caller can see of it, the pieces of text joined."""
        assert isinstance(self.events[-1], Finished)
        text = "".join(event.text for event in self.events if isinstance(event, TextDelta))
        scores = [event.score for event in self.events if isinstance(event, TextDelta)]
        prompt = [event for event in self.events if isinstance(event, PromptScores)]
        return [prompt, self.generated, text, scores, self.events[-1]]


def run(batcher: Batcher, sequences: list[Recorded], *, together: bool = True) -> list[list[object]]:
    """The answers, generated side by side or one after another."""
    for group in [sequences] if together else [[sequence] for sequence in sequences]:
        for sequence in group:
            batcher.add(sequence)
        while not batcher.idle:
            batcher.step()
    return [sequence.answer for sequence in sequences]
