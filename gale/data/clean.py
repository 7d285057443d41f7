"""Cleaning: one form for every text, and no document twice."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache

from gale.core.errors import DataError
from gale.data.recipe import Source
from gale.data.sources import Document, read_documents

_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b\u2060\ud800-\udfff]")
_SPACE = " \t\u3000"
_BLANK_LINES = re.compile(r"\n{3,}")
# No writing needs more marks on one letter (UAX #15, Stream-Safe Text Format), and normalising takes their square.
_MOST_MARKS = 30
_LAST_MARK = 0x1E94A  # from here on there are no combining characters


def normalise(text: str) -> str:
    """Unicode NFC, Unix line ends, no control, zero-width or half characters, at most one blank line in a row.

    What is not NFC yet keeps at most 30 combining marks in a row.
    """
    if not unicodedata.is_normalized("NFC", text):
        text = _marks().sub(lambda found: found[0][:_MOST_MARKS], text)
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    # Not by a pattern, which would look for the end of a long run of spaces from each of them.
    text = "\n".join(line.rstrip(_SPACE) for line in _UNWANTED.sub("", text).split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


@cache
def _marks() -> re.Pattern[str]:
    """Too many combining marks in a row."""
    marks = "".join(chr(code) for code in range(0x300, _LAST_MARK + 1) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{{_MOST_MARKS + 1},}}")


def normalise_document(document: Document) -> Document | None:
    """The document with every text normalised; None where nothing is left of it."""
    document = document.map(normalise)
    if document.rejected is not None:
        chosen, rejected = document.messages[-1]["content"], document.rejected
        # Of two answers that are the same none is better.
        return document if chosen and rejected and chosen != rejected else None
    answered = any(message["role"] == "assistant" and message["content"] for message in document.messages)
    return document if document.text or answered else None


def clean_documents(
    source: Source, *, replace: dict[str, str], seed: int, counts: Counter[str] | None = None
) -> Iterator[Document]:
    """Normalised documents of one source, empty ones left out; ``counts`` gains how many were read and empty."""
    counts = Counter() if counts is None else counts
    for document in read_documents(source, replace=replace, seed=seed):
        counts["read"] += 1
        if cleaned := normalise_document(document):
            yield cleaned
        else:
            counts["empty"] += 1


def sample_texts(source: Source, *, budget: int, replace: dict[str, str], seed: int) -> Iterator[list[str]]:
    """The first ``budget`` bytes of text of a source, document by document; the last one is cut where they end.

    Running text is one text, a conversation one a message. Raises :class:`DataError` for a source without any text.
    """
    left = budget
    for document in clean_documents(source, replace=replace, seed=seed):
        texts = []
        for text in document.texts:
            content = text.encode()[:left]
            left -= len(content)
            if kept := content.decode(errors="ignore"):  # no character is cut in two
                texts.append(kept)
        if texts:
            yield texts
        if not left:
            return
    if left == budget:
        raise DataError(f"{source.path} holds no text.", hint="Check the source's file, format and `only`.")


class ExactDeduplicator:
    """Remembers documents by a 128-bit hash of their content."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, digest: bytes) -> bool:
        """True the first time a document's :func:`fingerprint` is shown, False from then on."""
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def fingerprint(document: Document) -> bytes:
    """128-bit hash of a document's roles and texts."""
    content = hashlib.blake2b(digest_size=16)
    for part in (document.text or "", *(value for m in document.messages for value in (m["role"], m["content"]))):
        content.update(part.encode("utf-8", "surrogatepass") + b"\x00")
    if document.rejected is not None:
        content.update(document.rejected.encode("utf-8", "surrogatepass") + b"\x01")
    return content.digest()
