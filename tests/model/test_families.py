"""Every family opens from Hugging Face's layout with transformers' own logits, and what we save opens there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model, save_model
from gale.model.config import ModelConfig
from gale.model.rope import RopeScaling
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.batches import Batch
from gale.train.losses import trained_logprobs
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
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
FULL, WINDOW = "full_attention", "sliding_attention"
# Caps and scalars so small that they show.
GEMMA = {
    "head_dim": 10,
    "sliding_window": 7,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
}
PHI = {"pad_token_id": None}
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
    "qwen2, windows of their own choice": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [WINDOW, FULL, WINDOW]},
    ),
    "qwen2, rope yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2, rope dynamic": ("Qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, rope yarn with its own attention factor": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 8, "truncate": False}},
    ),
    "llama, rope yarn with scales": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
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
    "gemma2": ("Gemma2", GEMMA),
    "gemma2, odd vocabulary, untied": ("Gemma2", {**GEMMA, "vocab_size": 151, "tie_word_embeddings": False}),
    "gemma2, no soft-caps": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2, one key head, odd heads": (
        "Gemma2",
        {**GEMMA, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40},
    ),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, rope linear, windows of their own choice": (
        "Gemma3",
        {
            **GEMMA,
            "layer_types": [FULL, WINDOW, WINDOW],
            "rope_parameters": {FULL: LINEAR, WINDOW: {"rope_type": "default", "rope_theta": 700.0}},
        },
    ),
    "gemma3, all layers full": ("Gemma3", {**GEMMA, "layer_types": [FULL] * 3, "final_logit_softcapping": 3.0}),
    "gemma3, biases": ("Gemma3", {**GEMMA, "attention_bias": True}),
    "phi3": ("Phi3", PHI),
    "phi3, window": ("Phi3", {**PHI, "sliding_window": 7, "num_key_value_heads": 6}),
    "phi3, tied, part of each head rotated": (
        "Phi3",
        {
            **PHI,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3, rope longrope": (
        "Phi3",
        {**PHI, "original_max_position_embeddings": 16, "rope_parameters": {**LONGROPE}},
    ),
    "phi3, rope longrope within the original context": (
        "Phi3",
        {**PHI, "original_max_position_embeddings": 64, "rope_parameters": {**LONGROPE, "attention_factor": 1.2}},
    ),
}


def theirs(kind: str, settings: dict[str, Any]) -> Any:
    """A transformers model with weights random enough that every part of it shows in the logits."""
    torch.manual_seed(3)
    named = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{named}Config")(**{**SHAPE, **settings}, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


def our_logits(model: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], config=model.config)))


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


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3, tied, part of each head rotated"])
def test_it_trains_as_in_transformers(name: str, tmp_path: Path) -> None:
    """The loss and the gradients of every weight: through soft-caps, windows and norms of all kinds."""
    original = theirs(*CASES[name])
    original.save_pretrained(tmp_path)
    opened = load_model(tmp_path, dtype=torch.float32)
    ids = 1 + torch.arange(TOKENS)  # 0 is what transformers pads with, which gets no gradient
    batch = Batch(ids[:-1], ids[1:], torch.arange(TOKENS - 1), [TOKENS - 1])
    ours, known = -trained_logprobs(opened, batch).mean(), original(ids[None], labels=ids[None]).loss
    torch.testing.assert_close(ours, known)
    ours.backward()
    known.backward()
    expected = dict(original.named_parameters())
    for part in ("embed_tokens", "layers.0.input_layernorm", "layers.1.mlp.down_proj", "layers.2.self_attn.o_proj"):
        gradient = expected[f"model.{part}.weight"].grad
        assert gradient is not None
        torch.testing.assert_close(opened.get_parameter(f"{part}.weight").grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_sharded_weights_are_found(name: str, tmp_path: Path) -> None:
    original = theirs(*CASES[name])
    original.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = torch.arange(20)
    opened = load_model(tmp_path, dtype=torch.float32)
    assert (our_logits(opened, ids) - their_logits(original, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."], ids=["older", "newer"])
def test_the_text_half_of_a_gemma3_that_sees_opens(prefix: str, tmp_path: Path) -> None:
    original = theirs("Gemma3", GEMMA)
    original.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): weight for name, weight in tensors.items()}
    renamed |= {"vision_tower.patch.weight": torch.ones(3), "multi_modal_projector.norm.weight": torch.ones(3)}
    save_file(renamed, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "vision_config": {"hidden_size": 3}}))
    ids = torch.arange(30)
    opened = load_model(tmp_path, dtype=torch.float32)
    assert (our_logits(opened, ids) - their_logits(original, ids)).abs().max() < 1e-4


def test_what_published_gemma_folders_leave_out_is_as_transformers_takes_it() -> None:
    """The text half of gemma-3-4b says no more than this."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    content = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config, known = ModelConfig.from_hugging_face(content), transformers.Gemma3TextConfig(**text)
    assert config.vocabulary_size == known.vocab_size
    assert (config.heads, config.kv_heads) == (known.num_attention_heads, known.num_key_value_heads)
    assert (config.head_dim, config.context_length) == (known.head_dim, known.max_position_embeddings)
    assert [bool(config.window(n)) for n in range(34)] == [kind == WINDOW for kind in known.layer_types]
    assert config.rope_theta == known.rope_parameters[FULL]["rope_theta"] == 1e6
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    assert config.local_rope_theta == known.rope_parameters[WINDOW]["rope_theta"] == 10_000


def test_phi3_s_first_name_for_longrope_is_read() -> None:
    content = {**SHAPE, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    content |= {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "num_key_value_heads": 6}
    content["rope_scaling"] = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = ModelConfig.from_hugging_face(content).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_context_length) == ("longrope", 4.0, 32)
    assert scaling.attention_factor == pytest.approx((1 + math.log(4) / math.log(32)) ** 0.5)


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
