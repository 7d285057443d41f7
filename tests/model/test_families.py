"""Every family opens from Hugging Face's layout with transformers' own logits, and what we save opens there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model, save_model
from gale.model.config import ModelConfig, RopeScaling
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from tests.tiny_model import MIXTURE, make_model

transformers = pytest.importorskip("transformers")

TOKENS = 40
SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "llama": ("Llama", {}),
    "llama, one key head, odd heads": (
        "Llama",
        {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40},
    ),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, rope llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, rope linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "mistral, head size of its own": ("Mistral", {"head_dim": 10, "sliding_window": 1000}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window in upper layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3, bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "qwen3-moe, weights that sum to 1": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe, one expert a token": ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 1}),
    "qwen3-moe, all experts a token": ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 5}),
    "qwen3-moe, some layers dense": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0, 2]}),
    "qwen3-moe, every second layer": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}),
    "qwen3-moe, all layers dense": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0, 1, 2]}),
    "qwen3-moe, tied, biases": ("Qwen3Moe", {**EXPERTS, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-moe, window": ("Qwen3Moe", {**EXPERTS, "use_sliding_window": True, "sliding_window": 7}),
}


def theirs(kind: str, settings: dict[str, Any]) -> Any:
    """A transformers model with weights random enough that every part of it shows in the logits."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **settings}, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


def our_logits(model: Decoder, ids: Tensor) -> Tensor:
    config = model.config
    attend = PackedAttention(
        [len(ids)], sliding_window=config.sliding_window, sliding_from_layer=config.sliding_from_layer
    )
    with torch.no_grad():
        return model.logits(model(ids, torch.arange(len(ids)), attend))


@pytest.mark.parametrize("name", CASES)
def test_their_checkpoint_opens_here_and_ours_there_with_equal_logits(name: str, tmp_path: Path) -> None:
    original = theirs(*CASES[name])
    original.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, SHAPE["vocab_size"], (TOKENS,), generator=torch.Generator().manual_seed(1))
    expected = their_logits(original, ids)

    opened = load_model(tmp_path / "theirs", dtype=torch.float32)
    assert (our_logits(opened, ids) - expected).abs().max() < 1e-4

    save_model(opened, tmp_path / "ours", dtype=torch.float32)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(back) is type(original)
    assert (their_logits(back, ids) - expected).abs().max() < 1e-4
    assert load_model(tmp_path / "ours", dtype=torch.float32).config == opened.config


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_sharded_weights_are_found(name: str, tmp_path: Path) -> None:
    original = theirs(*CASES[name])
    original.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = torch.arange(20)
    opened = load_model(tmp_path, dtype=torch.float32)
    assert (our_logits(opened, ids) - their_logits(original, ids)).abs().max() < 1e-4


def test_the_older_spelling_of_rope_scaling_is_read() -> None:
    content = {**SHAPE, "architectures": ["LlamaForCausalLM"], "rope_theta": 7.0}
    content["rope_scaling"] = {"type": "linear", "factor": 2.0}
    config = ModelConfig.from_hugging_face(content)
    assert config.rope_theta == 7.0
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False}, MIXTURE], ids=["tied", "untied", "experts"])
def test_a_model_saved_in_bf16_loads_as_it_was_saved(
    changes: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = make_model(tokenizer, **changes)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    opened = load_model(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(opened.get_parameter(name), parameter.bfloat16().float())


def test_the_rotary_angles_stay_exact_when_weights_are_bf16(model: Decoder) -> None:
    positions = torch.arange(600)
    narrow = Decoder(model.config).to(torch.bfloat16)
    assert torch.equal(narrow.rotary(positions, torch.float32)[0], model.rotary(positions, torch.float32)[0])


@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "experts"])
def test_body_parameters_are_counted_without_embeddings(changes: dict[str, Any], tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer, **changes)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and n.startswith("layers."))
    assert model.config.body_parameters == matrices


def test_only_chosen_experts_count_as_active(tokenizer: Tokenizer) -> None:
    dense, mixture = make_model(tokenizer).config, make_model(tokenizer, **MIXTURE).config
    assert dense.active_body_parameters == dense.body_parameters
    idle = mixture.layers * (6 - 2) * 3 * mixture.hidden_size * 24
    assert mixture.active_body_parameters == mixture.body_parameters - idle
    head = mixture.hidden_size * mixture.vocabulary_size
    assert mixture.flops_per_token(0) == 6 * (mixture.active_body_parameters + head)
