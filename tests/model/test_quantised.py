"""Models with weights of 8 and 4 bits: what they lose, and that nothing else about them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gale.core import files
from gale.core.errors import GaleError
from gale.core.settings import settings
from gale.evals.bits_per_byte import bits_per_byte
from gale.model import kernels
from gale.model.checkpoint import load_model, load_tokenizer
from gale.model.packed import PackedExperts, PackedLinear, round_weight
from gale.model.quantised import _BITS, Weights, quantise
from gale.model.transformer import Decoder
from gale.registry.models import resolve_model
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, make_model, save_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings(), "home", tmp_path / "home")
    return tmp_path / "home"


def rounded(folder: Path, weights: Weights) -> Decoder:
    """The model of ``folder``, after its rounded weights have been kept."""
    model = load_model(folder, dtype=torch.bfloat16)
    if writing := quantise(model, weights, folder):
        writing.join()
    return model


@pytest.mark.parametrize(("bits", "exact"), [(8, True), (4, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_alone_computes_what_the_kernels_compute(
    bits: int, exact: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels.available():
        pytest.skip("no native kernels")
    torch.manual_seed(0)
    layer, x = nn.Linear(100, 70, bias=bias), torch.randn(9, 100)
    native = PackedLinear(bits, 100, 70, *round_weight(bits, layer.weight.data), layer.bias)
    monkeypatch.setattr(kernels, "available", lambda: False)
    plain = PackedLinear(bits, 100, 70, *round_weight(bits, layer.weight.data), layer.bias)
    assert native.native and not plain.native
    torch.testing.assert_close(native(x), plain(x), atol=1e-5, rtol=1e-5 if exact else 1e-4)
    loss = (native(x) - layer(x)).norm() / layer(x).norm()
    assert loss < (0.02 if bits == 8 else 0.12)


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.005), ("int4", 0.03)])
def test_the_built_in_model_loses_little_by_rounding(weights: Weights, most: float) -> None:
    folder = resolve_model(None)

    def score() -> float:
        model = load_model(folder, dtype=torch.bfloat16)
        quantise(model, kind)
        tokenizer = load_tokenizer(folder, model.config)
        texts = [(ROOT / name).read_text(encoding="utf-8")[:6000] for name in ("README.md", "README.zh.md")]
        return bits_per_byte(model, tokenizer, texts, window=256, title="").value

    kind: Weights = "bf16"
    whole = score()
    kind = weights
    assert score() < whole * (1 + most)


def packed_sizes(model: Decoder) -> list[int]:
    return [len(layer.packed) for layer in model.modules() if isinstance(layer, PackedLinear)]


def test_rounded_weights_are_kept_and_found_again(tokenizer: Tokenizer, tmp_path: Path, own_home: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "model", dtype=torch.bfloat16)
    first = rounded(folder, "int4")
    (kept,) = (own_home / "quantised").iterdir()
    written = kept.stat().st_ino
    second = rounded(folder, "int4")
    assert kept.stat().st_ino == written
    for one, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(one, PackedLinear):
            assert isinstance(other, PackedLinear)
            assert torch.equal(one.packed, other.packed) and torch.equal(one.scales, other.scales)
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: made anew
    rounded(folder, "int4")
    assert kept.stat().st_size > 100
    if kernels.available():  # of another size: the kernels would read beyond its end
        save_file({name: weight[: len(weight) // 2].clone() for name, weight in load_file(kept).items()}, kept)
        fourth = rounded(folder, "int4")
        assert packed_sizes(fourth) == packed_sizes(first)
    save_folder(tokenizer, folder, dtype=torch.bfloat16, hidden_size=56)  # another model in the same place
    rounded(folder, "int4")
    assert len(list((own_home / "quantised").iterdir())) == 2


def test_kept_weights_of_models_not_used_for_longest_go_first(
    tokenizer: Tokenizer, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save_folder(tokenizer, tmp_path / name, dtype=torch.bfloat16) for name in "abc"]

    def open_model(folder: Path) -> Path:
        rounded(folder, "int8")
        return max((own_home / "quantised").iterdir(), key=lambda path: path.stat().st_mtime_ns)

    first, second = open_model(folders[0]), open_model(folders[1])
    assert open_model(folders[0]) == first  # used again, which makes the other one the oldest
    monkeypatch.setattr(settings(), "kept_weights_gb", 2.5e-9 * first.stat().st_size)
    third = open_model(folders[2])
    assert set((own_home / "quantised").iterdir()) == {first, third} != {first, second}
    monkeypatch.setattr(settings(), "kept_weights_gb", 0)
    rounded(folders[1], "int8")
    assert set((own_home / "quantised").iterdir()) == {first, third}


def test_a_full_disk_costs_the_next_start_some_time_and_nothing_else(
    tokenizer: Tokenizer, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_folder(tokenizer, tmp_path / "model", dtype=torch.bfloat16)

    def full(path: Path) -> Path:
        raise GaleError(f"No space left while writing {path}.")

    monkeypatch.setattr(files, "new_file", full)
    model = rounded(folder, "int8")
    assert isinstance(model.lm_head, PackedLinear)


@pytest.mark.parametrize(("weights", "most"), [("bf16", 0.01), ("int8", 0.03), ("int4", 0.3)])
@pytest.mark.parametrize("native", [True, False])
def test_experts_are_rounded_one_by_one_and_the_router_is_not(
    tokenizer: Tokenizer, weights: Weights, most: float, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(kernels, "_native", lambda: None)
        monkeypatch.setattr(kernels, "has_bf16", lambda: False)
    elif not kernels.has_bf16():
        pytest.skip("no native kernels")
    whole, packed = (make_model(tokenizer, **MIXTURE).to(torch.bfloat16) for _ in range(2))
    quantise(packed, weights)
    x_NC = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        expected_NC, found_NC = (model.layers[1].mlp(x_NC) for model in (whole, packed))
        logits = [model.layers[1].mlp.gate(x_NC) for model in (whole, packed)]
    assert (found_NC - expected_NC).norm() < most * expected_NC.norm()
    torch.testing.assert_close(*logits, atol=0.02, rtol=0.02)
    experts = packed.layers[1].mlp.experts
    if native or weights != "bf16":
        assert isinstance(experts, PackedExperts)
        assert [layer.bits for layer in experts.gate_up_proj] == [_BITS[weights]] * 6


def test_rounded_experts_are_kept_too(tokenizer: Tokenizer, tmp_path: Path, own_home: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "model", dtype=torch.bfloat16, **MIXTURE)
    models = [rounded(folder, "int4")]
    (kept,) = (own_home / "quantised").iterdir()
    written = kept.stat().st_ino
    models.append(rounded(folder, "int4"))
    assert kept.stat().st_ino == written
    x_NC = torch.randn(9, 48).bfloat16()
    with torch.inference_mode():
        assert torch.equal(*(model.layers[0].mlp(x_NC) for model in models))


def test_a_tied_head_is_rounded_and_the_embedding_is_not(tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer, tied_embeddings=True).to(torch.bfloat16)
    before = model.embed_tokens.weight.clone()
    quantise(model, "int4")
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.bits == 8
    assert torch.equal(model.embed_tokens.weight, before)
