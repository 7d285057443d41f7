"""Byte-level BPE: training, loading and saving in the Hugging Face layout.

The heavy work is the ``tokenizers`` library's. Gale adds one rule: control tokens (``<|end|>``) come out of
:meth:`Tokenizer.encode` only when the caller asks for them, so text from people never turns into control.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from gale.core import files
from gale.core.errors import ModelError
from gale.core.model_folder import read_json

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
CONTROL_TOKENS = (
    END_OF_TEXT,
    END_OF_TURN,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<tool_call>",
    "</tool_call>",
    "<cite>",
    "</cite>",
    "<think>",
    "</think>",
)

_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")

# GPT-4's pre-tokenisation as Qwen2 varies it: digits stand alone, so numbers are read place by place.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level spelling stands for (Radford et al. 2019): printable bytes stand for
    themselves, the others are counted from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """A tokenizer of a model folder.

    ``settings`` is the content of ``tokenizer_config.json``; ``chat_template`` is the Jinja source of the chat
    template, if it names one. Raises :class:`ModelError` for settings of the wrong kind.
    """

    def __init__(self, backend: Backend, settings: dict[str, Any]) -> None:
        self._backend = backend
        self.settings = settings
        added = sorted(backend.get_added_tokens_decoder().items())
        self.control_tokens: list[str] = [token.content for _, token in added]
        self._added = {number: token.special for number, token in added}
        self.bos_token = _token_text(settings, "bos_token")
        self.eos_token = _token_text(settings, "eos_token")
        self.chat_template = _template_text(settings.get("chat_template"))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and ``tokenizer_config.json``. Raises :class:`ModelError`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json.", hint="Gale needs a model's fast tokenizer file.")
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}") from error
        settings = read_json(folder / "tokenizer_config.json")
        template_path = folder / "chat_template.jinja"  # where transformers 5 keeps it
        if template_path.is_file():
            try:
                settings["chat_template"] = template_path.read_text(encoding="utf-8")
            except (ValueError, OSError) as error:
                raise ModelError(f"{template_path} cannot be read: {error}") from error
        return cls(backend, settings)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocabulary_size: int, chat_template: str) -> Tokenizer:
        """Learn ``vocabulary_size`` byte-level BPE tokens (control tokens included) from ``texts``."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            min_frequency=2,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": END_OF_TURN,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        }
        return cls(backend, settings)

    def save(self, folder: Path) -> None:
        """Write the files that :meth:`load` (and transformers) read."""
        files.write_text(folder / "tokenizer.json", self.to_json())
        files.write_json(folder / "tokenizer_config.json", self.settings)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, control tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token_characters(self) -> int:
        """No token stands for more characters than this, so a text of n characters has at least n over this many.

        Byte-level vocabularies spell every byte as a character, others spell characters as themselves: either way a
        token's spelling is at least as long as its text.
        """
        return max(map(len, self.vocabulary))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id by its spelling, control tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """Token ids of ``text``, adding none; control tokens spelled in it count only with ``control_tokens``.

        Half a surrogate pair, which is no text, is read as the replacement character.
        """
        backend = self._backend if control_tokens else self._plain
        return backend.encode(_whole_characters(text), add_special_tokens=False).ids

    def encode_whole(self, text: str) -> list[int]:
        """As :meth:`encode` without control tokens, between those that this tokenizer puts around a text by itself."""
        return [*self._around[0], *self.encode(text), *self._around[1]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As :meth:`encode` without control tokens, for many texts on all cores."""
        whole = [_whole_characters(text) for text in texts]
        return [encoding.ids for encoding in self._plain.encode_batch_fast(whole, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, control_tokens: bool = False) -> str:
        """Text of ``ids``; control tokens are left out unless asked for."""
        return self._backend.decode(list(ids), skip_special_tokens=not control_tokens)

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """What one token adds to a text in UTF-8, which may be part of a character; ``b""`` for a control token
        unless asked for, and for a number without a token.
        """
        try:
            spelling = self._backend.id_to_token(token)
        except OverflowError:  # negative, or of more than 32 bits
            return b""
        if spelling is None:
            return b""
        if token in self._added:  # stands as it is; of these, decoding leaves out only those flagged "special"
            return b"" if self._added[token] and not control_tokens else spelling.encode()
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return bytes(_BYTES[character] for character in spelling)
        if byte := _BYTE_FALLBACK.fullmatch(spelling):  # how SentencePiece spells the bytes of rare characters
            return bytes([int(byte[1], 16)])
        return spelling.replace("\u2581", " ").encode()

    def to_json(self) -> str:
        """The content of ``tokenizer.json``."""
        return self._backend.to_str(pretty=False)

    def token_id(self, token: str) -> int | None:
        """Id of one token by its text, None where the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def stream(self, shown: Mapping[int, str] | None = None) -> TokenStream:
        """A decoder for one answer that arrives token by token.

        Tokens of ``shown`` come out as the single character given there, and that character never otherwise.
        """
        return TokenStream(self._backend, shown or {})

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        encoding = self._backend.encode("a", add_special_tokens=True)
        first, *_, last = [place for place, added in enumerate(encoding.special_tokens_mask) if not added] * 2
        return encoding.ids[:first], encoding.ids[last + 1 :]

    @cached_property
    def _plain(self) -> Backend:
        # The library matches added tokens in any text, and its switch against that spares those not flagged
        # "special" (Qwen's <tool_call>), so plain text gets a tokenizer that has never heard of them.
        content = json.loads(self._backend.to_str())
        content["added_tokens"] = []
        content["post_processor"] = None
        return Backend.from_str(json.dumps(content))


class TokenStream:
    """Turns tokens into text as they come, holding back bytes of an unfinished character."""

    def __init__(self, backend: Backend, shown: Mapping[int, str]) -> None:
        self._backend = backend
        self._shown = shown
        self._reserved = {ord(character): "\ufffd" for character in shown.values()}
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Text that has become certain with ``token``; may be empty."""
        if token in self._shown:
            return self._shown[token]
        text = self._stream.step(self._backend, token) or ""
        return text.translate(self._reserved) if self._reserved else text


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _token_text(settings: dict[str, Any], name: str) -> str | None:
    """A token is named by its text or, in older folders, by an object with that text as ``content``."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content", value)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"tokenizer_config.json names no token as {name}, but {value!r}.")
    return value


def _template_text(value: Any) -> str | None:
    """A chat template, or the default one of a list of named ones, as older folders have it."""
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict) and isinstance(entry.get("template"), str)]
        if len(entries) < len(value):
            raise ModelError("tokenizer_config.json lists a chat template without its text.")
        value = next((entry["template"] for entry in entries if entry.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"tokenizer_config.json holds a chat template that is no text, but {value!r}.")
    return value
