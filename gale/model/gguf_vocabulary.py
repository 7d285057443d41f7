"""A tokenizer as GGUF files hold it, for byte-level BPE vocabularies.

GGUF does not store how text is split before merging; it stores a name that llama.cpp has code for. So a tokenizer can
be exported only if one of those names means just what its ``tokenizer.json`` says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer as Backend

from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.text.tokenizer import Tokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of pre-tokenisers, by the steps that tokenizer.json lists and whether whole words skip the merges.
_PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (("split", rf"{_WORDS}|\p{{N}}|{_REST}"), ("bytes", ""), False): "qwen2",
    (("split", rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), ("bytes", ""), True): "llama-bpe",
    (("digits", ""), ("bytes", "words"), False): "smollm",
    (("bytes", "words"), False): "gpt-2",
}
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


# What other names of llama.cpp's mean the same.
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2", "deepseek-r1-qwen": "qwen2"}


def pre_tokenizer_steps(name: str) -> tuple[list[dict[str, Any]], bool]:
    """What llama.cpp's name of a pre-tokeniser means, as ``tokenizer.json`` says it, and whether words skip the merges.

    Raises :class:`ModelError` for a name that is unknown here.
    """
    name = _ALIASES.get(name, name)
    for (*steps, ignore_merges), known in _PRE_TOKENIZERS.items():
        if known == name:
            return [_written(*step) for step in steps], ignore_merges
    raise ModelError(
        f"Gale does not know how a tokenizer named {name!r} splits text.",
        hint=f"It knows {', '.join([*_PRE_TOKENIZERS.values(), *_ALIASES])}.",
    )


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """What ``tokenizer.ggml.*`` needs: tokens with their types, merges, and the ids of special tokens."""

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    @classmethod
    def read(cls, folder: Path, tokenizer: Tokenizer, size: int) -> GgufVocabulary:
        """The vocabulary of ``folder``, filled up to ``size`` tokens. Raises :class:`ModelError`."""
        content = read_json(folder / "tokenizer.json")
        model = content.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
            raise ModelError(f"{folder}: only byte-level BPE tokenizers can be exported to GGUF.")
        added = {token["id"]: bool(token.get("special")) for token in content.get("added_tokens") or []}
        spellings = {token: spelling for spelling, token in tokenizer.vocabulary.items()}
        types = []
        for token in range(size):
            if token not in spellings:
                kind = gguf.TokenType.UNUSED
            elif token in added:
                kind = gguf.TokenType.CONTROL if added[token] else gguf.TokenType.USER_DEFINED
            else:
                kind = gguf.TokenType.NORMAL
            types.append(int(kind))
        special = {}
        for name in ("bos", "eos", "unk", "pad"):
            text = tokenizer.settings.get(f"{name}_token")
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str) and (found := tokenizer.token_id(text)) is not None:
                special[name] = found
        framed = Backend.from_file(str(folder / "tokenizer.json")).encode("", add_special_tokens=True).ids
        return cls(
            pre_tokenizer=_pre_tokenizer(folder, content, model),
            tokens=[spellings.get(token, f"[PAD{token}]") for token in range(size)],
            types=types,
            merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])],
            special=special,
            adds_bos=bool(framed) and framed[0] == special.get("bos"),
            adds_eos=bool(framed) and framed[-1] == special.get("eos"),
            chat_template=_without_generation_tags(tokenizer.chat_template),
        )

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add everything to the header of a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _pre_tokenizer(folder: Path, content: dict[str, Any], model: dict[str, Any]) -> str:
    normalizer = content.get("normalizer")
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    key = (*map(_step, steps), bool(model.get("ignore_merges")))
    # Qwen's own tokenizers normalise to NFC, which llama.cpp leaves out for them too.
    if key in _PRE_TOKENIZERS and (normalizer is None or normalizer.get("type") == "NFC"):
        return _PRE_TOKENIZERS[key]
    raise ModelError(
        f"{folder}: llama.cpp has no name for how this tokenizer splits text, so a GGUF file would be read wrongly.",
        hint=f"Tokenizers that split like one of these can be exported: {', '.join(_PRE_TOKENIZERS.values())}.",
    )


def _step(step: dict[str, Any]) -> tuple[str, str]:
    match step:
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return "split", pattern
        case {"type": "Digits", "individual_digits": True}:
            return "digits", ""
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "bytes", "words" if step.get("use_regex", True) else ""
    return "unknown", str(step.get("type"))


def _written(kind: str, what: str) -> dict[str, Any]:
    """The opposite of :func:`_step`."""
    if kind == "split":
        return {"type": "Split", "pattern": {"Regex": what}, "behavior": "Isolated", "invert": False}
    if kind == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": what == "words"}


def _without_generation_tags(template: str | None) -> str | None:
    """The tags mark what is trained; readers of GGUF files may not know them, so comments take their places."""
    return template and _GENERATION_TAG.sub(r"{#\1 \2generation \3#}", template)
