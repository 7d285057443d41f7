"""Weights are the file itself, mapped into memory: opening copies nothing, and later changes do not reach them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from gale.core.device import return_freed_memory
from gale.model import kernels
from gale.model.checkpoint import load_model, save_model
from gale.model.config import ModelConfig
from gale.model.quantised import Weights, quantise
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.model.test_families import our_logits
from tests.tiny_model import MIXTURE, make_model

SHAPE = ModelConfig("qwen3", 30_000, 256, 1024, 6, 4, 2, 64, context_length=64)


def memory(kind: str) -> int:
    """Bytes of this process: Anonymous is its own memory, Rss all that it has in memory, mapped files included."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not Path("/proc/self/smaps_rollup").is_file():
        pytest.skip("this system does not tell how much memory a process has")
    model = Decoder(SHAPE)
    model.initialise(1)
    folder = tmp_path_factory.mktemp("large")
    save_model(model, folder, dtype=torch.bfloat16)
    load_model(folder, dtype=torch.bfloat16)  # what the first time loads besides does not count
    return folder


def test_opening_takes_no_memory_of_its_own(folder: Path) -> None:
    weights = (folder / "model.safetensors").stat().st_size
    before = memory("Anonymous")
    model = load_model(folder, dtype=torch.bfloat16)
    assert memory("Anonymous") - before < 0.1 * weights
    assert torch.isfinite(sum(parameter.sum() for parameter in model.parameters()))
    assert memory("Anonymous") - before < 0.1 * weights, "nor does reading every weight"
    assert 0.99 * weights < model.mapped_bytes < weights


@pytest.mark.parametrize(("weights", "size"), [("bf16", 1.0), ("int8", 0.65), ("int4", 0.5)])
def test_packed_weights_take_the_place_of_the_file_in_memory(folder: Path, weights: Weights, size: float) -> None:
    if not kernels.has_bf16():
        pytest.skip("no native kernels")
    stored = (folder / "model.safetensors").stat().st_size
    quantise(load_model(folder, dtype=torch.bfloat16), weights)  # what the first time loads besides does not count
    before = memory("Rss")
    model = load_model(folder, dtype=torch.bfloat16)
    assert torch.isfinite(sum(parameter.sum() for parameter in model.parameters()))
    quantise(model, weights)
    return_freed_memory()
    # Where the file stayed beside them it would be all of it more. A small model has some waste.
    assert memory("Rss") - before < size * stored + 0.25 * stored
    assert model.mapped_bytes < 1.1 * model.embed_tokens.weight.nbytes
    assert torch.equal(model.embed_tokens.weight, load_model(folder, dtype=torch.bfloat16).embed_tokens.weight)


@pytest.mark.parametrize(("weights", "size"), [("bf16", 1.0), ("int8", 0.5), ("int4", 0.29)])
def test_packing_holds_one_matrix_twice_and_not_the_model(weights: Weights, size: float, tmp_path: Path) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most that there was
    except OSError:
        pytest.skip("this system does not tell how much memory a process had at most")
    if not kernels.has_bf16():
        pytest.skip("no native kernels")
    model = Decoder(ModelConfig("qwen3", 500, 512, 2048, 8, 4, 2, 64, context_length=64))
    model.initialise(1)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    del model
    quantise(load_model(tmp_path, dtype=torch.bfloat16), weights)  # what the first time loads besides does not count
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("Rss")
    quantise(load_model(tmp_path, dtype=torch.bfloat16), weights)
    status = Path("/proc/self/status").read_text()
    most = int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before
    assert most < (size + 0.2) * (tmp_path / "model.safetensors").stat().st_size


def test_weights_in_another_format_are_held_once(folder: Path) -> None:
    weights = 2 * (folder / "model.safetensors").stat().st_size
    before = memory("Rss")
    model = load_model(folder, dtype=torch.float32)
    assert memory("Rss") - before < 1.3 * weights
    assert model.mapped_bytes == 0
    assert model.lm_head.weight is model.embed_tokens.weight


def test_another_file_in_its_place_does_not_change_the_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(make_model(tokenizer), tmp_path, dtype=torch.float32)
    opened = load_model(tmp_path, dtype=torch.float32)
    other = make_model(tokenizer)
    other.initialise(8)
    save_model(other, tmp_path, dtype=torch.float32)
    ids = torch.arange(20)
    assert torch.equal(our_logits(opened, ids), our_logits(make_model(tokenizer), ids))
    assert torch.equal(our_logits(load_model(tmp_path, dtype=torch.float32), ids), our_logits(other, ids))


def test_training_changes_the_model_and_not_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for changes in ({}, MIXTURE):
        save_model(make_model(tokenizer, **changes), tmp_path, dtype=torch.float32)
        before = (tmp_path / "model.safetensors").read_bytes()
        opened = load_model(tmp_path, dtype=torch.float32)
        optimiser = torch.optim.SGD(opened.parameters(), lr=1.0)
        for parameter in opened.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        for name, parameter in make_model(tokenizer, **changes).named_parameters():
            assert torch.equal(opened.get_parameter(name), parameter - 1)
        assert (tmp_path / "model.safetensors").read_bytes() == before
