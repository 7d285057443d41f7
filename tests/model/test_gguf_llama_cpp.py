"""llama.cpp itself computes and splits alike. Runs where `pip install llama-cpp-python` has been done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gale.model.checkpoint import load_model
from gale.model.gguf_export import FORMATS
from gale.model.rope import RopeScaling
from gale.text.tokenizer import Tokenizer
from tests.model.test_families import our_logits
from tests.model.test_gguf_export import KINDS, LLAMA, export
from tests.tiny_model import save_folder

llama_cpp = pytest.importorskip("llama_cpp")

TEXT = "The wind's over 12 hills;\n\n 风从山上吹来，don't wait  for\tit! <|end|> naïve 2024"
SHAPES: dict[str, dict[str, Any]] = {
    **KINDS,
    "experts, untied": {**KINDS["experts"], "tied_embeddings": False},
    "rope llama3": {**LLAMA, "rope_scaling": RopeScaling("llama3", 8.0, original_context_length=64)},
    "rope linear": {"rope_scaling": RopeScaling("linear", 4.0)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_its_logits_are_ours(shape: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert_alike(save_folder(tokenizer, tmp_path / "model", **SHAPES[shape]), tokenizer, "fp32")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_number_format_is_read(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert_alike(save_folder(tokenizer, tmp_path / "model", hidden_size=64), tokenizer, kind)


def assert_alike(folder: Path, tokenizer: Tokenizer, kind: str) -> None:
    reader = llama_cpp.Llama(str(export(folder, kind)), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    ids = tokenizer.encode(TEXT)
    reader.eval(ids)
    ours = our_logits(load_model(folder, dtype=torch.float32), torch.tensor(ids)).numpy()
    error = np.abs(reader.scores[: len(ids)] - ours).max() / np.abs(ours).max()
    assert error < {"fp32": 2e-3, "fp16": 4e-3, "bf16": 3e-2, "q8_0": 5e-2}[kind]  # its KV cache is fp16
    assert reader.tokenize(TEXT.encode(), add_bos=False) == ids
    assert reader.tokenize(TEXT.encode(), add_bos=False, special=True) == tokenizer.encode(TEXT, control_tokens=True)
