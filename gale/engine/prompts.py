"""The half of an engine that needs no weights: texts and conversations become tokens, and tokens become text."""

from __future__ import annotations

from pathlib import Path

from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.engine.reply import tools_for_template
from gale.engine.request import ContextLengthError, PromptError, Tools
from gale.text.template import PLAIN_CHAT_TEMPLATE, ChatTemplate, Message
from gale.text.tokenizer import Tokenizer

_MEGABYTE = 2**20


class Prompts:
    """What ``tokenizer`` and its ``template`` make of what is asked, within a vocabulary and a context; any thread."""

    def __init__(self, tokenizer: Tokenizer, *, vocabulary_size: int, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._context_length = context_length
        self.template = ChatTemplate(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE, tokenizer)

    def encode(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode`."""
        self._refuse_megabytes(len(text))
        return self._tokenizer.encode(text, control_tokens=True)

    def encode_text(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_text`."""
        self._refuse_megabytes(len(text))
        return self._tokenizer.encode_whole(text)

    def encode_chat(
        self, messages: list[Message], tools: Tools | None = None, template: ChatTemplate | None = None
    ) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode_chat`; with ``tools``, and by another ``template`` if given."""
        shown = tools_for_template(tools) if tools else None
        self._refuse_megabytes(_characters([messages, shown]))
        if (written := _characters([messages, shown], whole=True)) > _MEGABYTE:
            self._refuse_megabytes(written)
        return (template or self.template).prompt(messages, tools=shown)

    def of_adapter(self, folder: Path) -> tuple[ChatTemplate | None, frozenset[int]]:
        """The template of an adapter's own, and what ends its answers beside the model's, where it has a tokenizer.

        Raises :class:`ModelError` for another tokenizer than the model's.
        """
        if not (folder / "tokenizer.json").is_file():
            return None, frozenset()
        tokenizer = Tokenizer.load(folder)
        theirs = tokenizer.vocabulary
        if any(theirs.get(token) != number for token, number in self._tokenizer.vocabulary.items()):
            raise ModelError(f"The adapter {folder} was made with another tokenizer than the model's.")
        own = tokenizer.chat_template
        return None if own is None else ChatTemplate(own, self._tokenizer), end_tokens(folder, tokenizer)

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """See :meth:`gale.engine.request.Engine.token_bytes`."""
        return self._tokenizer.token_bytes(token, control_tokens=control_tokens)

    def check(self, prompt: list[int]) -> None:
        """Raises :class:`PromptError` for tokens that the model cannot read."""
        if not prompt:
            raise PromptError("A prompt needs at least one token.")
        if not 0 <= min(prompt) <= max(prompt) < self._vocabulary_size:
            raise PromptError(f"This model's tokens are numbered from 0 to {self._vocabulary_size - 1}.")

    def _refuse_megabytes(self, characters: int) -> None:
        """Raises :class:`ContextLengthError` at once for what cannot fit in any way.

        Encoding megabytes takes seconds during which the tokenizer holds Python's lock, and so the whole server.
        """
        least = characters // self._tokenizer.longest_token_characters
        if least > self._context_length:
            raise ContextLengthError(least, self._context_length, at_least=True)


def end_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: what ``generation_config.json``, ``config.json`` and the tokenizer name."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids.update(token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))
    if tokenizer.eos_token is not None and (token := tokenizer.token_id(tokenizer.eos_token)) is not None:
        ids.add(token)
    return frozenset(ids)


def _characters(value: object, *, whole: bool = False) -> int:
    """Characters of all texts in a message or a tool, however deep, which a template shows.

    The ``whole`` of it, with names and numbers, may be more than it shows.
    """
    if isinstance(value, dict):
        return sum(len(key) * whole + _characters(each, whole=whole) for key, each in value.items())
    if isinstance(value, list):
        return len(value) * whole + sum(_characters(each, whole=whole) for each in value)
    return len(value) if isinstance(value, str) else int(whole)
