"""The tokenizer that a GGUF file holds: byte-level BPE, or SentencePiece's BPE with scores."""

from __future__ import annotations

import json
from typing import Any

import gguf
from tokenizers import Tokenizer as Backend

from gale.core.errors import ModelError
from gale.model.gguf_file import GgufFile
from gale.model.gguf_vocabulary import pre_tokenizer_steps
from gale.text.tokenizer import Tokenizer

_SPACE = "\u2581"  # how SentencePiece spells a space


def read_tokenizer(file: GgufFile, vocabulary_size: int) -> Tokenizer:
    """The tokenizer with its chat template. Raises :class:`ModelError` for one that Gale cannot build."""
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens, kind = fields.get("tokens"), fields.get("model")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{file.path} holds no tokenizer.")
    if len(tokens) > vocabulary_size:
        raise ModelError(f"{file.path}: its tokenizer knows {len(tokens)} tokens, its model only {vocabulary_size}.")
    types = fields.get("token_type") or [int(gguf.TokenType.NORMAL)] * len(tokens)
    try:
        if kind == "gpt2":
            content = _byte_level(fields, tokens, types)
        elif kind == "llama":
            content = _sentence_piece(fields, tokens, types)
        else:
            raise ModelError(f"Gale cannot build tokenizers of kind {kind!r}.", hint="It can build gpt2 and llama.")
        special = {name: _spelling(fields.get(f"{name}_token_id"), tokens) for name in ("bos", "eos", "padding")}
        content["added_tokens"] = [
            {
                "id": token,
                "content": spelling,
                "special": types[token] == gguf.TokenType.CONTROL,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for spelling, token in content["model"]["vocab"].items()
            if types[token] in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED) and not _is_blank(spelling)
        ]
        content["post_processor"] = _frame(fields, special)
        backend = Backend.from_str(json.dumps({"version": "1.0", **content}))
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception, and what a file says may be of any kind
        raise ModelError(f"{file.path}: its tokenizer cannot be read: {error}") from error
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special["bos"],
        "eos_token": special["eos"],
        "pad_token": special["padding"],
        "clean_up_tokenization_spaces": False,
        "chat_template": file.fields.get("tokenizer.chat_template"),
    }
    return Tokenizer(backend, settings)


def end_tokens(file: GgufFile) -> list[int]:
    """Ids that end an answer."""
    found = (file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return sorted({token for token in found if isinstance(token, int)})


def _byte_level(fields: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    name = fields.get("pre", "default")
    steps, ignore_merges = pre_tokenizer_steps(name)
    vocabulary = {spelling: token for token, spelling in enumerate(tokens) if types[token] != gguf.TokenType.UNUSED}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [merge.split(" ", 1) for merge in fields["merges"]],
            "ignore_merges": ignore_merges,
            "byte_fallback": False,
            "fuse_unk": False,
        },
    }


def _sentence_piece(fields: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Scores become merges: what makes a piece may be merged, best piece first (as SentencePiece does).

    Runs of spaces and newlines, which Gemma lists as tokens of the user's own, come before all others.
    """
    scores = fields["scores"]
    text = {
        spelling: token
        for token, spelling in enumerate(tokens)
        if types[token] == gguf.TokenType.NORMAL
        or (types[token] == gguf.TokenType.USER_DEFINED and _is_blank(spelling))
    }
    merges: list[tuple[tuple[bool, float, int], str, str]] = []
    for spelling, token in text.items():
        rank = types[token] == gguf.TokenType.NORMAL, -scores[token], token
        for cut in range(1, len(spelling)):
            left, right = spelling[:cut], spelling[cut:]
            if left in text and right in text:
                merges.append((rank, left, right))
    merges.sort(key=lambda merge: merge[0])
    vocabulary = {}
    for token, spelling in enumerate(tokens):
        if spelling not in text:  # found in a text as it is, before spaces are respelled
            spelling = spelling.replace(_SPACE, " ")
        if types[token] != gguf.TokenType.UNUSED:
            vocabulary[spelling] = token
    prefix = bool(fields.get("add_space_prefix", True))
    respell = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), respell],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[left, right] for _, left, right in merges],
            "unk_token": _spelling(fields.get("unknown_token_id"), tokens),
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }


def _frame(fields: dict[str, Any], special: dict[str, str | None]) -> dict[str, Any] | None:
    """What stands around every text, where the file says that something does."""
    # Where it does not say, llama.cpp begins SentencePiece's texts with a bos.
    first = special["bos"] if fields.get("add_bos_token", fields["model"] == "llama") else None
    last = special["eos"] if fields.get("add_eos_token", False) else None
    ids = {name: fields[f"{key}_token_id"] for key, name in (("bos", first), ("eos", last)) if name}
    if not ids:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    before, after = ([{"SpecialToken": {"id": name, "type_id": 0}}] if name else [] for name in (first, last))
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, {"Sequence": {"id": "B", "type_id": 0}}, *after],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in ids.items()},
    }


def _is_blank(spelling: str) -> bool:
    return not spelling.strip(_SPACE + " \n\t")


def _spelling(token: Any, tokens: list[str]) -> str | None:
    return tokens[token] if isinstance(token, int) and 0 <= token < len(tokens) else None
