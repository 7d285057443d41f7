"""Sources to documents: reading packed JSON lines and turning each row into text or a conversation."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from gale.core.errors import DataError
from gale.data.recipe import QuestionTemplates, Source
from gale.text.template import Message

_SENTENCE = re.compile(r"[^。！？.!?\n]*(?:[。！？\n]|[.!?](?=\s|$))*\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """Running text, or a conversation."""

    text: str | None = None
    messages: tuple[Message, ...] = ()


def read_documents(source: Source, *, replace: Mapping[str, str], seed: int) -> Iterator[Document]:
    """All documents of a source in file order. Raises :class:`DataError` naming the file and the line."""
    if source.format == "qa":
        yield from _question_documents(source, seed)
        return
    for line, row in _rows(source.path):
        if source.only and row.get("source") not in source.only:
            continue
        try:
            if source.format == "text":
                yield Document(text=_filled(row["text"], replace))
            elif source.format == "parallel":
                yield Document(text=f"{row['en']}\n{row['zh']}")
            else:
                messages = tuple(
                    Message(role=message["role"], content=_filled(message["content"] or "", replace))
                    for message in row["messages"]
                )
                if not row.get("tools"):  # conversations with tools come with the tool-calling stage
                    yield Document(messages=messages)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source.path}, line {line}: not a row of the format {source.format!r} ({error!r})."
            ) from error


def open_text(path: Path) -> IO[str]:
    """Open a plain, gzip or zstd file as UTF-8 text."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        stream = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(path.open("rb"), closefd=True)
        return io.TextIOWrapper(stream, encoding="utf-8")
    return path.open(encoding="utf-8")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"There is no data file {path}.", hint="Check the path in the recipe.")
    line = 0
    try:
        with open_text(path) as lines:
            for line, text in enumerate(lines, start=1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}, line {line}: not a JSON object.")
                    yield line, row
    except ValueError as error:  # includes broken JSON and broken UTF-8
        raise DataError(f"{path}, line {line + 1}: {error}") from error
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{path} is damaged after line {line}: {error}") from error


def _filled(text: str, replace: Mapping[str, str]) -> str:
    for placeholder, value in replace.items():
        text = text.replace(placeholder, value)
    return text


def _question_documents(source: Source, seed: int) -> Iterator[Document]:
    questions = source.questions
    assert questions is not None
    rows = [row for _, row in _rows(source.path)]
    for index, row in enumerate(rows):
        # A generator of its own for each row, so that a change elsewhere leaves this row's document as it was.
        draw = random.Random(f"{seed}/{source.path.name}/{index}")  # noqa: S311
        try:
            document = _question_document(row, rows, questions, draw)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{source.path}, row {index + 1}: not a row of the format 'qa' ({error!r}).") from error
        if document:
            yield document


def _question_document(
    row: dict[str, Any], rows: list[dict[str, Any]], questions: QuestionTemplates, draw: random.Random
) -> Document | None:
    question = row["question"].strip()
    answer = row["answers"][0]["text"].strip() if row["answers"] else ""
    kind = draw.random()
    limit = draw.randint(*questions.context_characters)
    prompt = draw.choice(questions.prompts)
    if kind < questions.closed_book:
        return _exchange(question, questions.closed_book_reply)
    if kind < questions.closed_book + questions.unanswerable or not answer:
        other = row if not answer else draw.choice(rows)
        if answer and answer.lower() in other["context"].lower():
            return None
        context = _window(other["context"], 0, 0, limit)
        return _exchange(prompt.format(context=context, question=question), questions.unanswerable_reply)
    start = row["answers"][0]["start"]
    # Where the answer is no span of the passage, the whole passage may be needed to find it.
    context = row["context"] if start < 0 else _window(row["context"], start, start + len(answer), limit)
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
