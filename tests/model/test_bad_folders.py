"""A model folder that cannot be opened says what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gale.core.errors import ModelError
from gale.model.checkpoint import load_model, save_model
from gale.model.config import FAMILIES
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, make_model


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


def config(**changes: Any) -> Callable[[Path], object]:
    """A fault in config.json; None removes a key."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A fault in model.safetensors."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def shorten(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (shutil.rmtree, ["There is no model folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config cut short": (lambda f: (f / "config.json").write_text('{"vocab'), ["config.json", "not valid JSON"]),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), ["JSON object"]),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["not valid JSON"]),
    "architecture": (
        config(architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", *FAMILIES],
    ),
    "no architecture": (config(architectures=None, model_type=None), ["unnamed"]),
    "quantised": (config(quantization_config={"bits": 4}), ["pre-quantised"]),
    "activation": (config(hidden_act="gelu"), ["gelu", "silu"]),
    "rope scaling": (config(rope_parameters={"rope_type": "proportional", "factor": 2.0}), ["proportional", "llama3"]),
    "longrope of too few factors": (
        config(rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ["4 factors", "longrope"],
    ),
    "rope without factor": (config(rope_parameters={"rope_type": "linear"}), ["factor"]),
    "rope is no table": (config(rope_parameters="linear"), ["wrong kind"]),
    "an unknown kind of layer": (
        config(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", "linear_attention"]),
        ["full_attention or sliding_attention"],
    ),
    "both directions": (config(use_bidirectional_attention=True), ["both directions"]),
    "windows of too few layers": (
        config(use_sliding_window=True, sliding_window=4, layer_types=["full_attention"]),
        ["each of 2 layers"],
    ),
    "nested too deeply": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), ["config.json", "recursion"]),
    "vocabulary beyond any memory": (config(vocab_size=10**12), ["embed_tokens.weight", "[1000000000000, 48]"]),
    "sizes beyond any number": (config(intermediate_size=10**30), ["no computer"]),
    "layers beyond any patience": (config(num_hidden_layers=6_000_000), ["holds 2 layers", "6000000"]),
    "layers too few": (config(num_hidden_layers=1), ["no place for: layers.1."]),
    "missing key": (config(hidden_size=None), ["hidden_size"]),
    "wrong kind": (config(hidden_size="many"), ["wrong kind"]),
    "no heads": (config(num_attention_heads=0), ["heads 0"]),
    "heads do not divide": (config(num_key_value_heads=4), ["6 heads", "4 key heads"]),
    "odd head size": (config(head_dim=7), ["7 dimensions"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["lacks its weights", "safetensors only"]),
    "cut short": (shorten, ["model.safetensors", "cut short"]),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), ["damaged"]),
    "weight missing": (weights(lambda t: t.pop(NORM)), ["lacks 1 weights", "norm.weight"]),
    "weight too many": (weights(lambda t: t.update({"model.extra": torch.ones(1)})), ["no place for: extra"]),
    "weight of wrong shape": (weights(lambda t: t.update({NORM: torch.ones(3)})), ["norm.weight", "[3]", "[48]"]),
    "weight of two shapes": (weights(lambda t: t.update({"norm.weight": torch.ones(3)})), ["another weight norm"]),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["no weight map"]),
    "index names a lost shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}'),
        ["lost.safetensors"],
    ),
}


UP = "model.layers.1.mlp.experts.3.up_proj.weight"
MIXTURE_FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "experts without a number": (config(num_experts=None), ["lacks 'num_experts'"]),
    "experts of no number": (config(num_experts="many"), ["wrong kind"]),
    "no experts": (config(num_experts=0), ["experts with count 0"]),
    "more experts a token than there are": (config(num_experts_per_tok=7), ["7 of 6 experts"]),
    "experts beyond any patience": (config(num_experts=10**9), ["holds 6 experts", "1000000000"]),
    "experts too few": (config(num_experts=5), ["no place for: layers.0.mlp.experts.5."]),
    "experts of another size": (config(moe_intermediate_size=8), ["[48, 24]", "[48, 8]"]),
    "experts beyond any memory": (config(moe_intermediate_size=10**30), ["no computer"]),
    "dense layers that are none": (config(mlp_only_layers=[1]), ["no place for: layers.1.mlp.experts."]),
    "experts where there are none": (config(mlp_only_layers="no"), ["wrong kind"]),
    "step of no layers": (config(decoder_sparse_step=0), ["every 0"]),
    "expert missing": (weights(lambda t: t.pop(UP)), ["lacks 1 weights", UP.removeprefix("model.")]),
    "expert of wrong shape": (weights(lambda t: t.update({UP: torch.ones(48, 24)})), ["up_proj", "[48, 24]"]),
    "router missing": (weights(lambda t: t.pop("model.layers.0.mlp.gate.weight")), ["layers.0.mlp.gate.weight"]),
    "expert outside any layer": (weights(lambda t: t.update({"a.mlp.experts.": torch.ones(1)})), ["no place for: a."]),
}


@pytest.mark.parametrize("fault", [*FAULTS, *MIXTURE_FAULTS])
def test_the_fault_is_named(folder: Path, tokenizer: Tokenizer, fault: str) -> None:
    spoil, said = {**FAULTS, **MIXTURE_FAULTS}[fault]
    if fault in MIXTURE_FAULTS:
        save_model(make_model(tokenizer, **MIXTURE), folder, dtype=torch.float32)
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load_model(folder, dtype=torch.float32)
    message = f"{caught.value.message} {caught.value.hint}"
    assert all(part in message for part in said), message
