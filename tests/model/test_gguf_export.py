"""A GGUF file holds what the folder holds: every weight, the shape, and the vocabulary; transformers reads it alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from gale.core.errors import GaleError, ModelError
from gale.model.checkpoint import load_model, save_model
from gale.model.gguf_export import FORMATS, export_gguf
from gale.model.rope import RopeScaling
from gale.model.transformer import rotary_frequencies
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import Tokenizer
from tests.model.test_families import our_logits, their_logits
from tests.tiny_model import MIXTURE, TEXTS, make_model, save_folder

# Qwen3's heads have 128 dimensions where a file does not say: transformers does not ask the file.
WIDE: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 128, "vocabulary_size": 410}
LLAMA: dict[str, Any] = {"family": "llama", "qk_norm": False, "vocabulary_size": 410}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": WIDE,
    "qwen3, untied": {**WIDE, "tied_embeddings": False},
    "qwen2": {**LLAMA, "family": "qwen2", "qkv_bias": True},
    "llama": LLAMA,
    "llama, biases": {**LLAMA, "qkv_bias": True, "output_bias": True, "mlp_bias": True, "tied_embeddings": False},
    "mistral": {**LLAMA, "family": "mistral"},
    "experts": {**MIXTURE, "vocabulary_size": 410},
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def export(folder: Path, kind: str = "fp32") -> Path:
    export_gguf(folder, folder / "model.gguf", kind=kind, name="tiny")
    return folder / "model.gguf"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_file_with_our_logits(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_folder(tokenizer, tmp_path / "model", **KINDS[kind])
    export(folder)
    settings: dict[str, Any] = {}
    if kind in ("experts", "llama, biases"):  # of these shapes transformers reads less than the file says
        settings["config"] = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, **settings
    ).eval()
    ids = torch.arange(50)
    ours = our_logits(load_model(folder, dtype=torch.float32), ids)
    assert (ours - their_logits(theirs, ids)).abs().max() < 1e-3 * ours.abs().max()


def test_the_header_tells_the_shape(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fields, tensors = read(export(save_folder(tokenizer, tmp_path / "model", **KINDS["experts"])))
    expected = {
        "general.architecture": "qwen3moe",
        "general.name": "tiny",
        "qwen3moe.vocab_size": 410,
        "qwen3moe.context_length": 700,
        "qwen3moe.embedding_length": 48,
        "qwen3moe.block_count": 2,
        "qwen3moe.feed_forward_length": 80,
        "qwen3moe.attention.head_count": 6,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 8,
        "qwen3moe.attention.value_length": 8,
        "qwen3moe.rope.freq_base": 10_000.0,
        "qwen3moe.rope.dimension_count": 8,
        "qwen3moe.expert_count": 6,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 24,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert list(tensors["blk.1.ffn_gate_exps.weight"].shape) == [48, 24, 6], "fastest dimension first"


@pytest.mark.parametrize("kind", FORMATS)
def test_each_number_format_holds_the_weights_as_closely_as_it_can(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = save_folder(tokenizer, tmp_path / "model", **{**MIXTURE, "hidden_size": 64})
    model = load_model(folder, dtype=torch.float32)
    fields, tensors = read(export(folder, kind))
    assert fields["general.file_type"] == {"fp32": 0, "fp16": 1, "bf16": 32, "q8_0": 7}[kind]
    error = {"fp32": 0.0, "fp16": 1e-3, "bf16": 8e-3, "q8_0": 1e-2}[kind]
    layer: Any = model.layers[1]
    for name, weight in {
        "token_embd.weight": model.embed_tokens.weight,
        "output_norm.weight": model.norm.weight,
        "blk.1.attn_q.weight": layer.self_attn.q_proj.weight,
        "blk.1.ffn_gate_inp.weight": layer.mlp.gate.weight,
        "blk.1.ffn_up_exps.weight": layer.mlp.experts.gate_up_proj[:, 24:],
        "blk.1.ffn_down_exps.weight": layer.mlp.experts.down_proj,
    }.items():
        tensor, expected = tensors[name], weight.detach().numpy()
        stored = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(stored - expected).max() <= error * np.abs(expected).max(), name
    kinds = {name: tensors[name].tensor_type.name for name in tensors}
    assert kinds["output_norm.weight"] == kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.1.attn_q.weight"] == {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[kind]
    if kind == "q8_0":
        assert kinds["blk.1.ffn_down_exps.weight"] == "F16", "rows of 24 do not fill blocks of 32"


def test_a_tied_head_is_stored_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert "output.weight" not in read(export(save_folder(tokenizer, tmp_path / "tied")))[1]
    assert "output.weight" in read(export(save_folder(tokenizer, tmp_path / "untied", tied_embeddings=False)))[1]


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rope_is_told(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    scaling = RopeScaling(kind, 8.0, original_context_length=64)
    folder = save_folder(tokenizer, tmp_path / "model", **LLAMA, rope_scaling=scaling)
    fields, tensors = read(export(folder))
    config = load_model(folder, dtype=torch.float32).config
    factors = np.full(4, fields.get("llama.rope.scaling.factor", 1.0))
    assert fields.get("llama.rope.scaling.type") == ("linear" if kind == "linear" else None)
    if kind == "llama3":
        factors = tensors["rope_freqs.weight"].data
    plain = 10_000.0 ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / factors, rotary_frequencies(config).numpy(), rtol=1e-5)


def test_the_vocabulary_is_the_tokenizers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fields, _ = read(export(save_folder(tokenizer, tmp_path / "model", vocabulary_size=tokenizer.vocabulary_size + 3)))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {token: i for i, token in enumerate(tokens[:-3])} == tokenizer.vocabulary
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    assert control == tokenizer.control_tokens
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|end|>"
    assert tokens[fields["tokenizer.ggml.padding_token_id"]] == "<|endoftext|>"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
    )
    assert (
        model.tokenize("ĠtheĠriver")[0].id
        == Backend.from_file(str(tmp_path / "model" / "tokenizer.json")).model.tokenize("ĠtheĠriver")[0].id
    )


def test_the_chat_template_renders_alike_without_our_own_tags(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fields, _ = read(export(save_folder(tokenizer, tmp_path / "model")))
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where does the river go?"},
        {"role": "assistant", "content": "To the sea."},
        {"role": "user", "content": "And then?"},
    ]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(fields["tokenizer.chat_template"])
    ours = ChatTemplate(tokenizer.chat_template or "", tokenizer)
    assert plain.render(messages=messages, add_generation_prompt=True) == ours.render(
        messages, add_generation_prompt=True
    )


def trained(pre_tokenizer: Any, **model: Any) -> Tokenizer:
    backend = Backend(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return Tokenizer(backend, {"eos_token": None})


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (BYTES, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES]), None),
        (pre_tokenizers.Metaspace(), None),
    ],
)
def test_how_text_is_split_has_its_name_or_is_refused(steps: Any, name: str | None, tmp_path: Path) -> None:
    tokenizer = trained(steps)
    folder = save_folder(tokenizer, tmp_path / "model")
    if name is None:
        with pytest.raises(ModelError, match="no name for how this tokenizer splits"):
            export(folder)
    else:
        assert read(export(folder))[0]["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**LLAMA, "family": "mistral", "sliding_window": 64}, "sliding-window"),
        ({"qkv_bias": True, "output_bias": True}, "bias on the attention's output"),
        ({"rope_scaling": RopeScaling("llama3", 8.0)}, "llama3 RoPE scaling outside Llama"),
        ("normalise", "do not sum to 1"),
        ("dense_layers", "layers without experts"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: Any, said: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    if isinstance(changes, str):
        spoiled = {"normalise": False} if changes == "normalise" else {"dense_layers": (0,)}
        changes = {**MIXTURE, "experts": replace(MIXTURE["experts"], **spoiled)}
    folder = save_folder(tokenizer, tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=said):
        export(folder)
    assert not list(folder.glob("*.gguf"))


def test_a_weight_too_large_for_fp16_leaves_no_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model(tokenizer)
    model.embed_tokens.weight.data[3, 3] = 1e6
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"token_embd\.weight holds values too large for F16"):
        export(tmp_path / "model", "fp16")
    assert not list((tmp_path / "model").glob("*gguf*"))
    export(tmp_path / "model", "bf16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model(tokenizer)
    model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    save_model(model, tmp_path / "model", dtype=torch.float32)
    tokenizer.save(tmp_path / "model")
    for kind in FORMATS:
        with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds values that are no numbers"):
            export(tmp_path / "model", kind)
    assert not list((tmp_path / "model").glob("*gguf*"))


def test_only_a_gguf_file_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "model")
    export(folder)
    before = (folder / "model.gguf").read_bytes()
    export(folder)
    assert (folder / "model.gguf").read_bytes() == before
    for other in (folder / "config.json", folder):
        with pytest.raises(GaleError, match="something else"):
            export_gguf(folder, other, kind="fp32", name="tiny")
    assert load_model(folder, dtype=torch.float32)
