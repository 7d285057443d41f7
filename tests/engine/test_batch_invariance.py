"""In bf16 an answer has the same bits alone and in a full batch, log-probabilities included, its prompt cut or not.

With packed or rounded weights that is the kernels' promise; with plain ones it is torch's, for products of some width.

In fp32 the products of torch differ in their last bits for few rows, so there the promise is only that of near ties.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gale.engine.batcher import Batcher
from gale.model import kernels
from gale.model.quantised import Weights, quantise
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.engine.recorded import BF16_SHAPE, Recorded, make_bf16_model, run
from tests.tiny_model import MIXTURE, make_model

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
]


def requests(tokenizer: Tokenizer, count: int = 16, shortest: int = 10) -> list[Recorded]:
    draws = torch.Generator().manual_seed(1)
    lengths = [1, 300, 2, 17, 64, 128, 33, 5]
    return [
        Recorded(
            tokenizer,
            torch.randint(tokenizer.vocabulary_size, (lengths[index % 8],), generator=draws).tolist(),
            max_tokens=shortest + index,
            logprobs=2,
            prompt_logprobs=index % 3 == 0,
            **KINDS[index % 4],
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("kind", [{}, MIXTURE], ids=["dense", "experts"])
def test_an_answer_has_the_same_bits_alone_and_in_a_full_batch(tokenizer: Tokenizer, kind: dict[str, Any]) -> None:
    check(make_bf16_model(tokenizer, **kind), tokenizer)


@pytest.mark.skipif(not kernels.has_bf16(), reason="only the kernels promise this")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", [{}, MIXTURE], ids=["dense", "experts"])
def test_with_kernels_a_model_of_any_width_keeps_its_bits(
    tokenizer: Tokenizer, weights: Weights, kind: dict[str, Any]
) -> None:
    model = make_model(tokenizer, **kind).to(torch.bfloat16)
    quantise(model, weights)
    check(model, tokenizer)


def check(model: Decoder, tokenizer: Tokenizer) -> None:
    answers = []
    for together, chunk in ((True, 64), (False, 64), (True, 23)):
        batcher = Batcher(model, max_running=16, max_cached_tokens=100_000, prefill_chunk=chunk)
        answers.append(run(batcher, requests(tokenizer, shortest=40), together=together))
    assert answers[0] == answers[1] == answers[2]


def test_the_linear_layers_that_this_rests_on_do_not_look_at_their_neighbours() -> None:
    weight = torch.randn(BF16_SHAPE["intermediate_size"], BF16_SHAPE["hidden_size"]).bfloat16()
    rows = torch.randn(64, weight.shape[1]).bfloat16()
    whole = torch.nn.functional.linear(rows, weight)
    for count in (1, 2, 3, 7, 8, 17):
        assert torch.equal(torch.nn.functional.linear(rows[:count], weight), whole[:count])
