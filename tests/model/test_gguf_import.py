"""GGUF files open with the logits of the model they were made from, in every number format, and with its tokenizer."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from gale.core.errors import ModelError
from gale.model.checkpoint import load_model, load_tokenizer
from gale.model.config import ModelConfig
from gale.model.gguf_export import export_gguf
from gale.model.gguf_file import GgufFile
from gale.model.gguf_import import convert_gguf, gguf_config
from gale.model.gguf_tokenizer import read_tokenizer
from gale.model.rope import RopeScaling
from gale.text.tokenizer import Tokenizer
from tests.model.gguf_files import as_fp32, open_gguf, packed_as, write_gguf
from tests.model.test_families import CASES, GEMMA, LONGROPE, PHI, our_logits, their_logits, theirs
from tests.model.test_gguf_export import KINDS, LLAMA, export
from tests.tiny_model import save_folder

transformers = pytest.importorskip("transformers")
IDS = torch.arange(40)
# What a file has no key for is as llama.cpp takes it.
GEMMA_2 = {**GEMMA, "query_pre_attn_scalar": 10, "num_hidden_layers": 3}
GEMMA_3 = {**GEMMA_2, "num_hidden_layers": 7, "final_logit_softcapping": None}


@pytest.mark.parametrize("kind", [*KINDS, "rope llama3", "rope linear"])
def test_what_we_export_we_open_alike(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ropes = {
        "rope llama3": {**LLAMA, "rope_scaling": RopeScaling("llama3", 8.0, original_context_length=64)},
        "rope linear": {**LLAMA, "rope_scaling": RopeScaling("linear", 8.0)},
    }
    folder = save_folder(tokenizer, tmp_path / "model", **{**KINDS, **ropes}[kind])
    path = export(folder)
    expected = our_logits(load_model(folder, dtype=torch.float32), IDS)
    assert torch.allclose(our_logits(open_gguf(path), IDS), expected, rtol=1e-5, atol=1e-5)
    convert_gguf(path, tmp_path / "again")
    again = load_model(tmp_path / "again", dtype=torch.float32)
    assert torch.allclose(our_logits(again, IDS), expected, rtol=1e-5, atol=1e-5)
    assert load_tokenizer(tmp_path / "again", again.config).vocabulary == tokenizer.vocabulary
    export_gguf(tmp_path / "again", tmp_path / "again.gguf", kind="fp32", name="tiny")
    assert GgufFile.read(tmp_path / "again.gguf").tensors.keys() == GgufFile.read(path).tensors.keys()


@pytest.mark.parametrize(
    ("kind", "settings", "extra"),
    [
        ("Gemma2", GEMMA_2, {}),
        ("Gemma3", GEMMA_3, {"add_rope_freq_base": 1e6}),
        ("Phi3", PHI, {"add_rope_dimension_count": 8}),
        (
            "Phi3",
            {**PHI, "original_max_position_embeddings": 16, "rope_parameters": {**LONGROPE, "attention_factor": 1.2}},
            {
                "add_rope_dimension_count": 8,
                "add_rope_scaling_orig_ctx_len": 16,
                "add_rope_scaling_attn_factors": 1.2,
                "rope_factors_short.weight": LONGROPE["short_factor"],
                "rope_factors_long.weight": LONGROPE["long_factor"],
            },
        ),
    ],
    ids=["gemma2", "gemma3", "phi3", "phi3, longrope"],
)
def test_families_that_we_do_not_export_open_too(
    kind: str, settings: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    original = theirs(kind, settings)
    write_gguf(tmp_path / "model.gguf", original, extra=extra)
    opened = open_gguf(tmp_path / "model.gguf")
    expected = their_logits(original, IDS)
    assert (our_logits(opened, IDS) - expected).abs().max() < 1e-4
    reader = (
        type(original)
        .from_pretrained(
            tmp_path, gguf_file="model.gguf", config=original.config, dtype=torch.float32, attn_implementation="eager"
        )
        .eval()
    )
    assert (their_logits(reader, IDS) - expected).abs().max() < 1e-4, "the file is what transformers takes it for"


def q4_k(block: bytes) -> np.ndarray:
    """256 numbers of 144 bytes, as the format's description has it: eight groups, each with a scale and a minimum."""
    scale, minimum = np.frombuffer(block[:4], np.float16).astype(np.float64)
    packed, quants = block[4:16], block[16:]
    numbers = []
    for group in range(8):
        if group < 4:
            s, m = packed[group] & 63, packed[group + 4] & 63
        else:
            s = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            m = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
        half = quants[group // 2 * 32 : group // 2 * 32 + 32]
        numbers += [scale * s * (q >> 4 * (group % 2) & 15) - minimum * m for q in half]
    return np.array(numbers)


def q6_k(block: bytes) -> np.ndarray:
    """256 numbers of 210 bytes: low four bits, high two bits, sixteen scales, and a scale of scales."""
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8).astype(np.float64)
    scale = float(np.frombuffer(block[208:], np.float16)[0])
    numbers = np.empty(256)
    for half in range(2):
        for place in range(128):
            nibble = low[64 * half + place % 64] >> (4 if place >= 64 else 0) & 15
            bits = high[32 * half + place % 32] >> 2 * (place // 32) & 3
            numbers[128 * half + place] = scale * scales[8 * half + place // 16] * ((nibble | bits << 4) - 32)
    return numbers


def random_blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> np.ndarray:
    """Any bits are a matrix; only the scales must be numbers."""
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (*shape[:-1], shape[-1] // 256, 144 if kind == Kind.Q4_K else 210), np.uint8)
    scales = chance.uniform(1e-4, 1e-3, (*blocks.shape[:-1], 2)).astype(np.float16).view(np.uint8)
    if kind == Kind.Q4_K:
        blocks[..., :4] = scales
    else:
        blocks[..., 208:] = scales[..., :2]
    return blocks.reshape(*shape[:-1], -1)


def test_q4_k_m_is_unpacked_as_the_format_says_and_as_transformers_does(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    original = theirs("Llama", {**wide, "num_hidden_layers": 1})
    expected: dict[str, Tensor] = {}

    def pack(name: str, numbers: np.ndarray) -> tuple[np.ndarray, Kind]:
        if numbers.ndim == 1:
            return numbers, Kind.F32
        kind = Kind.Q6_K if name in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight", "output.weight") else Kind.Q4_K
        packed = random_blocks(numbers.shape, kind, len(expected))
        size, unpack = (144, q4_k) if kind == Kind.Q4_K else (210, q6_k)
        blocks = packed.reshape(-1, size)
        numbers = np.concatenate([unpack(block.tobytes()) for block in blocks]).reshape(numbers.shape)
        expected[name] = torch.from_numpy(numbers).float()
        return packed, kind

    write_gguf(tmp_path / "model.gguf", original, pack=pack)
    opened = open_gguf(tmp_path / "model.gguf")
    layer: Any = opened.layers[0]
    for name, weight in {
        "token_embd": opened.embed_tokens.weight,
        "output": opened.lm_head.weight,
        "blk.0.attn_v": layer.self_attn.v_proj.weight,
        "blk.0.ffn_gate": layer.mlp.gate_proj.weight,
        "blk.0.ffn_down": layer.mlp.down_proj.weight,
    }.items():
        torch.testing.assert_close(weight.detach(), expected[f"{name}.weight"], rtol=1e-5, atol=1e-7)
    reader = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    difference = (our_logits(opened, IDS) - their_logits(reader, IDS)).abs().max()
    assert difference < 1e-3 * their_logits(reader, IDS).abs().max()
    convert_gguf_without_tokenizer(tmp_path)


def convert_gguf_without_tokenizer(folder: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        convert_gguf(folder / "model.gguf", folder / "out")


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_weights_are_what_the_gguf_library_unpacks(kind: Kind, tmp_path: Path) -> None:
    original = theirs("Qwen3", {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    write_gguf(tmp_path / "model.gguf", original, pack=packed_as(kind))
    opened = open_gguf(tmp_path / "model.gguf")
    for name, weight in original.named_parameters():
        numbers = weight.detach().numpy()
        if numbers.ndim > 1:
            numbers = gguf.dequantize(gguf.quantize(numbers, kind), kind)
        assert np.array_equal(opened.get_parameter(name.removeprefix("model.")).detach().numpy(), numbers), name
    narrow = open_gguf(tmp_path / "model.gguf", torch.bfloat16)
    assert torch.equal(narrow.embed_tokens.weight, opened.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize(("kind", "stored"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("q8_0", "BF16")])
def test_a_converted_folder_keeps_the_numbers(kind: str, stored: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "model", **{**LLAMA, "hidden_size": 96, "intermediate_size": 96})
    convert_gguf(export(folder, kind), tmp_path / "again")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    wide = open_gguf(folder / "model.gguf")
    for name, weight in load_model(tmp_path / "again", dtype=dtype).named_parameters():
        assert torch.equal(weight, wide.get_parameter(name).to(dtype)), name


TEXTS = [
    "The wind came over the hill, and the door fell shut.",
    "风从山上吹来，门关上了。 don't  wait\n\n\t12 345 naïve 🙂",
    "<|user|>Where does the river go?<|end|> <tool_call>",
]


def test_the_byte_level_tokenizer_and_its_template_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_folder(tokenizer, tmp_path / "model", vocabulary_size=tokenizer.vocabulary_size + 5)
    opened = read_tokenizer(GgufFile.read(export(folder)), tokenizer.vocabulary_size + 5)
    assert opened.vocabulary == tokenizer.vocabulary
    assert opened.control_tokens == tokenizer.control_tokens
    assert (opened.eos_token, opened.bos_token) == (tokenizer.eos_token, tokenizer.bos_token)
    for text in TEXTS:
        for control in (False, True):
            ids = tokenizer.encode(text, control_tokens=control)
            assert opened.encode(text, control_tokens=control) == ids
            assert opened.decode(ids, control_tokens=control) == tokenizer.decode(ids, control_tokens=control)
    assert opened.chat_template is not None
    assert "assistant" in opened.chat_template


def sentence_piece(tmp_path: Path, *, prefix: bool) -> Path:
    """A file with a vocabulary as SentencePiece makes it: later pieces are longer, and worth less."""
    pieces = [
        "▁",
        *"abcdehilnorstvw",
        "he",
        "▁t",
        "▁the",
        "in",
        "▁w",
        "ind",
        "▁wind",
        "er",
        "▁r",
        "▁ri",
        "ver",
        "▁river",
    ]
    pieces += ["iv", "▁riv", "t▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|user|>", "▁▁"]
    special = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 3, 4]
    model = theirs("Llama", {"vocab_size": len(tokens) + 2})
    settings = {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_scores": [0.0] * 259 + [-float(place) for place in range(len(pieces))] + [0.0, 0.0],
        "add_token_types": special,
        "add_bos_token_id": 1,
        "add_eos_token_id": 2,
        "add_unk_token_id": 0,
        "add_add_space_prefix": prefix,
        "add_chat_template": "{{ messages }}",
    }
    write_gguf(tmp_path / "model.gguf", model, extra=settings)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentence_piece_tokenizer_is_built_from_its_scores(prefix: bool, tmp_path: Path) -> None:
    path = sentence_piece(tmp_path, prefix=prefix)
    convert_gguf(path, tmp_path / "folder")
    opened = load_tokenizer(tmp_path / "folder", ModelConfig.load(tmp_path / "folder"))
    ids = opened.encode("the wind in the river")
    spelled = {token: spelling for spelling, token in opened.vocabulary.items()}
    first = ["▁the"] if prefix else ["t", "he"]
    assert [spelled[token] for token in ids] == [*first, "▁wind", "▁", "in", "▁the", "▁river"]
    assert opened.decode(ids) == "the wind in the river"
    for text in ["Ünï 风 🙂", "the  wind\n"]:
        assert opened.decode(opened.encode(text)) == text
    assert opened.encode("<|user|>") != opened.encode("<|user|>", control_tokens=True) == [opened.token_id("<|user|>")]
    assert (opened.bos_token, opened.eos_token, opened.chat_template) == ("<s>", "</s>", "{{ messages }}")
    assert opened._backend.encode("in").ids[0] == 1, "llama.cpp begins such texts with a bos"


def test_a_sentence_piece_tokenizer_encodes_as_that_of_transformers(tmp_path: Path) -> None:
    path = sentence_piece(tmp_path, prefix=True)
    opened = read_tokenizer(GgufFile.read(path), 1000)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ["the wind in the river", "theriver wwind", "a  b\nc", "Ü 风"]:
        assert opened.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_a_gguf_file_that_cannot_be_opened_says_why(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = export(save_folder(tokenizer, tmp_path / "model", **LLAMA))
    content = path.read_bytes()
    (tmp_path / "whole.gguf").write_bytes(content)

    def refused(changed: bytes, said: str) -> None:
        path.write_bytes(changed)
        with pytest.raises(ModelError, match=said):
            open_gguf(path)

    refused(b"", "damaged")
    refused(b"GGML" + content[4:], "does not begin with GGUF")
    refused(content[:4] + struct.pack("<I", 9) + content[8:], "version is 9")
    refused(content[:8] + struct.pack("<QQ", 2**63, 2**63) + content[24:], "ends within its header")
    for length in (5, 30, 300, 3000, len(content) // 2, len(content) - 1):
        refused(content[:length], "cut short")
    refused(content.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0bloom", 1), "architecture bloom")
    refused(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"), "lacks the weight blk.1.attn_q.weight")
    whole = GgufFile.read(tmp_path / "whole.gguf")
    whole.fields["split.count"] = 3
    with pytest.raises(ModelError, match="one of several"):
        gguf_config(whole)
    refused(content.replace(b"llama.block_count", b"llama.block_c0unt"), "lacks 'block_count'")
    chance = random.Random(1)
    for _ in range(60):
        place = chance.randrange(len(content) // 3)
        path.write_bytes(content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :])
        with contextlib.suppress(ModelError):
            convert_gguf(path, tmp_path / "out")


def test_more_tokens_than_the_model_has_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = GgufFile.read(export(save_folder(tokenizer, tmp_path / "model")))
    with pytest.raises(ModelError, match="its model only 100"):
        read_tokenizer(file, 100)
    file.fields["tokenizer.ggml.pre"] = "some-new-one"
    with pytest.raises(ModelError, match="some-new-one"):
        read_tokenizer(file, 1000)
    file.fields["tokenizer.ggml.model"] = "t5"
    with pytest.raises(ModelError, match="t5"):
        read_tokenizer(file, 1000)


def test_a_kind_of_numbers_that_the_library_cannot_unpack_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", theirs(*CASES["qwen3"]), pack=as_fp32)
    file = GgufFile.read(tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    assert file.tensors["output_norm.weight"].kind == Kind.F32
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8  # behind its dimensions
    spoiled = content[:at] + struct.pack("<I", Kind.I32) + content[at + 4 :]
    (tmp_path / "model.gguf").write_bytes(spoiled)
    with pytest.raises(ModelError, match="cannot unpack I32"):
        open_gguf(tmp_path / "model.gguf")
