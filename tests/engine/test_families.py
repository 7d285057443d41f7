"""Greedy answers of the engine are those of transformers, token by token, for every family that opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gale.engine.batcher import Batcher
from gale.engine.request import SamplingParams
from gale.engine.rollouts import generate
from gale.engine.sequence import Sequence
from gale.model.checkpoint import load_model
from gale.model.transformer import Decoder
from tests.model.test_families import CASES, SHAPE, theirs

ROOM: dict[str, Any] = {"max_position_embeddings": 160}
NAMES = [
    "llama",
    "llama, one key head, odd heads",
    "llama, rope llama3",
    "mistral, window",
    "qwen2, windows of their own choice",
    "qwen2, rope yarn",
    "qwen3",
    "qwen3-moe",
    "gemma2",
    "gemma2, one key head, odd heads",
    "gemma3",
    "gemma3, rope linear, windows of their own choice",
    "phi3, window",
    "phi3, tied, part of each head rotated",
    "phi3, rope longrope",
]


class NoText:
    def push(self, token: int) -> str:
        return ""


def served(model: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    """As the engine serves them: side by side, prompts in small chunks, each sequence with a cache of its own."""
    batcher = Batcher(model, max_running=8, max_cached_tokens=10_000, prefill_chunk=11)
    params = SamplingParams(max_tokens=count, temperature=0)
    sequences = [
        Sequence(prompt, params, room=count, end_tokens=frozenset(), stream=NoText(), emit=lambda _: None)
        for prompt in prompts
    ]
    for sequence in sequences:
        batcher.add(sequence)
    while not batcher.idle:
        batcher.step()
    return [sequence.generated for sequence in sequences]


def their_greedy(original: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return original.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_64_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, settings = CASES[name]
    original = theirs(kind, {**settings, **ROOM})
    original.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(SHAPE["vocab_size"], (size,), generator=generator).tolist() for size in (20, 45)]
    wanted = [their_greedy(original, prompt, 64) for prompt in prompts]
    model = load_model(tmp_path, dtype=torch.float32)
    assert served(model, [list(prompt) for prompt in prompts], 64) == wanted
    sampling = SamplingParams(max_tokens=64, temperature=0)
    assert [answer.tokens for answer in generate(model, prompts, sampling, end_tokens=frozenset())] == wanted
