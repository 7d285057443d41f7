"""Sources to documents: reading packed JSON lines and turning each row into text or a conversation."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from gale.core.errors import DataError
from gale.data.recipe import QuestionTemplates, Source
from gale.text.template import Message

# Up to and with its closing marks; a full stop within a number or a name (3.5, gale.org) closes nothing.
_SENTENCE = re.compile(r"(?:[^。！？.!?\n]|[.!?](?!\s|$))*(?:[。！？\n]|[.!?](?=\s|$))*\s*")
_ROLES = ("system", "user", "assistant", "tool")
_ZSTD_READ = 2**20


@dataclass(frozen=True, slots=True)
class Document:
    """Running text, or a conversation, or a preference: a conversation and what its last answer is preferred to.

    Of a conversation with ``last_only`` just the last answer is trained.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    rejected: str | None = None
    last_only: bool = False

    def halves(self) -> tuple[Document, ...]:
        """The conversation with the preferred and the one with the rejected answer; any other document is itself."""
        if self.rejected is None:
            return (self,)
        answers = (self.messages[-1], Message(role="assistant", content=self.rejected))
        return tuple(Document(messages=(*self.messages[:-1], answer), last_only=True) for answer in answers)


def read_documents(source: Source, *, replace: Mapping[str, str], seed: int) -> Iterator[Document]:
    """All documents of a source in file order. Raises :class:`DataError` naming the file and the line."""
    if source.format == "qa":
        yield from _question_documents(source, seed)
        return
    for line, row in _chosen_rows(source):
        with _explain_row(source, line):
            document = _document(row, source, replace)
        if document:
            yield document


def _document(row: dict[str, Any], source: Source, replace: Mapping[str, str]) -> Document | None:
    if source.format == "text":
        return Document(text=_filled(_text(row, "text"), replace))
    if source.format == "parallel":
        return Document(text=_filled(f"{_text(row, 'en')}\n{_text(row, 'zh')}", replace))
    if row.get("tools"):
        return None  # conversations with tools come with the tool-calling stage
    if source.format == "preference":
        return _preference(row, replace)
    return Document(messages=_messages(row["messages"], replace))


def _preference(row: dict[str, Any], replace: Mapping[str, str]) -> Document:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chosen, rejected = (_filled(_text(row, key), replace) for key in ("chosen", "rejected"))
    answer = Message(role="assistant", content=chosen)
    return Document(messages=(*_messages(prompt, replace), answer), rejected=rejected)


def _messages(rows: list[dict[str, Any]], replace: Mapping[str, str]) -> tuple[Message, ...]:
    messages = []
    for message in rows:
        if message["role"] not in _ROLES:
            raise ValueError(f"unknown role {message['role']!r}")
        content = "" if message["content"] is None else _text(message, "content")
        messages.append(Message(role=message["role"], content=_filled(content, replace)))
    return tuple(messages)


@contextlib.contextmanager
def _explain_row(source: Source, line: int) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{source.path}, line {line}: not a row of the format {source.format!r}: {reason}.") from error


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(value := row[key], str):
        raise TypeError(f"{key!r} is not text")
    return value


def _chosen_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in _rows(source.path):
        if not source.only or row.get("source") in source.only:
            yield line, row


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and content of each line that is not empty."""
    if not path.is_file():
        raise DataError(f"There is no data file {path}.", hint="Check the path in the recipe.")
    line = 0
    try:
        for line, raw in enumerate(_lines(path), start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # includes broken UTF-8
                raise DataError(f"{path}, line {line}: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {line}: not a JSON object.")
            yield line, row
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path} is damaged after line {line}: {error}", hint="Copy or download the file again."
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, gzip or zstd file."""
    if path.suffix == ".zst":
        yield from _zstd_lines(path)
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    # Not the library's stream reader: it ends without a word where a file is cut short, and after the first frame.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    pending = b""
    with path.open("rb") as file:
        while packed := file.read(_ZSTD_READ):
            while packed:
                if frame.eof:
                    frame = decompressor.decompressobj()
                pending += frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
            *lines, pending = pending.split(b"\n")
            yield from lines
    if not frame.eof:
        raise EOFError("the last frame is cut short")
    if pending:
        yield pending


def _filled(text: str, replace: Mapping[str, str]) -> str:
    for placeholder, value in replace.items():
        text = text.replace(placeholder, value)
    return text


def _question_documents(source: Source, seed: int) -> Iterator[Document]:
    questions = source.questions
    assert questions is not None
    rows = list(_chosen_rows(source))
    contexts = [row.get("context") for _, row in rows]
    for variant, (index, (line, row)) in itertools.product(range(questions.variants), enumerate(rows)):
        # A generator of its own for each row, so that a change elsewhere leaves this row's document as it was.
        name = f"{seed}/{source.path.name}/{index}" + (f"/{variant}" if variant else "")
        draw = random.Random(name)  # noqa: S311
        with _explain_row(source, line):
            document = _question_document(row, contexts, questions, draw)
        if document:
            yield document


def _question_document(
    row: dict[str, Any], contexts: list[Any], questions: QuestionTemplates, draw: random.Random
) -> Document | None:
    question, own_context = _text(row, "question").strip(), _text(row, "context")
    answer = _text(row["answers"][0], "text").strip() if row["answers"] else ""
    if questions.spans_only and answer and row["answers"][0]["start"] < 0:
        return None
    kind = draw.random()
    limit = draw.randint(*questions.context_characters)
    prompt = draw.choice(questions.prompts)
    if kind < questions.closed_book:
        return _exchange(question, questions.closed_book_reply)
    if kind < questions.closed_book + questions.unanswerable or not answer:
        other = own_context if not answer else draw.choice(contexts)
        if answer and answer.lower() in other.lower():
            return None
        context = _window(other, 0, 0, limit)
        return _exchange(prompt.format(context=context, question=question), questions.unanswerable_reply)
    start = row["answers"][0]["start"]
    # Where the answer is no span of the passage, the whole passage may be needed to find it.
    context = own_context if start < 0 else _window(own_context, start, start + len(answer), limit)
    ending = "。" if re.search(r"[\u4e00-\u9fff]", answer) else "."
    answer = answer if answer[-1] in "。.!?！？" else answer + ending
    return _exchange(prompt.format(context=context, question=question), answer[0].upper() + answer[1:])


def _exchange(question: str, answer: str) -> Document:
    return Document(messages=(Message(role="user", content=question), Message(role="assistant", content=answer)))


def _window(text: str, start: int, end: int, limit: int) -> str:
    """Whole sentences round ``text[start:end]``, growing to both sides while they fit in ``limit`` characters."""
    spans = [match.span() for match in _SENTENCE.finditer(text) if match.end() > match.start()]
    first = next((i for i, span in enumerate(spans) if span[1] > start), len(spans) - 1)
    last = next((i for i, span in enumerate(spans) if span[1] >= end), len(spans) - 1)
    grown = True
    while grown:
        grown = False
        if first > 0 and spans[last][1] - spans[first - 1][0] <= limit:
            first, grown = first - 1, True
        if last + 1 < len(spans) and spans[last + 1][1] - spans[first][0] <= limit:
            last, grown = last + 1, True
    return text[spans[first][0] : spans[last][1]].strip()
