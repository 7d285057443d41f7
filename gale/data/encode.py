"""Documents to token ids with the mask of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gale.core.errors import DataError
from gale.data.sources import Document
from gale.text.template import ChatTemplate
from gale.text.tokenizer import END_OF_TEXT, Tokenizer


class DocumentEncoder:
    """Documents to token ids with the mask of what is trained.

    Running text stands between two end-of-text tokens: the first gives its first word something to follow, the
    last teaches the model to stop. A conversation is rendered by the chat template, which also says what the
    assistant wrote.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None or (end := tokenizer.token_id(END_OF_TEXT)) is None:
            raise DataError("The tokenizer has no chat template or no end-of-text token.", hint="Train one with Gale.")
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer.chat_template, tokenizer)
        self._end = end

    def encode(self, documents: Sequence[Document]) -> Iterator[tuple[list[int], list[bool]]]:
        """Ids and trained flags of each document, in order."""
        texts = iter(self._tokenizer.encode_batch([d.text for d in documents if d.text is not None]))
        for document in documents:
            if document.text is not None:
                ids = [self._end, *next(texts), self._end]
                yield ids, [True] * len(ids)
            else:
                chat = self._template.encode(document.messages)
                if not any(chat.trained):
                    raise DataError(
                        "The tokenizer's chat template does not mark what the assistant writes.",
                        hint="Put {% generation %} and {% endgeneration %} round it.",
                    )
                yield chat.ids, _last_answer(chat.trained) if document.last_only else chat.trained


def _last_answer(trained: list[bool]) -> list[bool]:
    """The last unbroken stretch of what is trained: the template leaves something between any two answers."""
    end = max(index for index, flag in enumerate(trained) if flag) + 1
    start = max((index + 1 for index in range(end) if not trained[index]), default=0)
    return [start <= index < end for index in range(len(trained))]
