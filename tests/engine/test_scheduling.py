"""An answer is the same however it was scheduled: alone, in a full batch, its prompt read at once or in pieces."""

from __future__ import annotations

import pytest
import torch

from gale.engine.batcher import Batcher
from gale.engine.request import SamplingParams
from gale.engine.rollouts import _NoText
from gale.engine.sequence import Sequence
from gale.model import kernels
from gale.model.quantised import Weights, quantise
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import make_model


@pytest.mark.skipif(not kernels.has_bf16(), reason="only the kernels promise this")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_how_it_was_scheduled(
    tokenizer: Tokenizer, weights: Weights, temperature: float
) -> None:
    model = make_model(tokenizer).to(torch.bfloat16)
    quantise(model, weights)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (14,), generator=generator).tolist()
    prompts = [torch.randint(0, tokenizer.vocabulary_size, (n,), generator=generator).tolist() for n in lengths]

    def answers(wanted: list[int], chunk: int) -> list[list[int]]:
        batcher = Batcher(model, max_running=64, max_cached_tokens=10**6, prefill_chunk=chunk)
        sequences = [
            Sequence(
                list(prompts[seed]),
                SamplingParams(max_tokens=60, temperature=temperature, seed=seed),
                room=600,
                end_tokens=frozenset(),
                stream=_NoText(),
                emit=lambda event: None,
            )
            for seed in wanted
        ]
        for sequence in sequences:
            batcher.add(sequence)
        while not batcher.idle:
            batcher.step()
        return [sequence.generated for sequence in sequences]

    together = answers(list(range(14)), 256)
    assert answers(list(range(14)), 7) == together
    assert [answers([seed], 256)[0] for seed in range(14)] == together
