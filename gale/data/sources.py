"""Sources to documents: turning each row into text or a conversation."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gale.core.errors import DataError
from gale.data.readers import BrokenRowError, OnRead, Row, read_rows
from gale.data.recipe import FORMAT_KEYS, QuestionTemplates, Source
from gale.data.source_files import find_files
from gale.text.template import Message

# Up to and with its closing marks; a full stop within a number or a name (3.5, gale.org) closes nothing.
_SENTENCE = re.compile(r"(?:[^。！？.!?\n]|[.!?](?!\s|$))*(?:[。！？\n]|[.!?](?=\s|$))*\s*")
_ROLES = ("system", "user", "assistant", "tool")
_ROLE_ALIASES = {"human": "user", "gpt": "assistant"}  # the ShareGPT layout
_MESSAGE_KEYS = ("role", "content")  # keys of each message, not of the row
_OPTIONAL_KEYS = ("input", "source")
_BROKEN_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Document:
    """Running text, or a conversation.

    With ``rejected`` the conversation's last answer is the better of two. ``last_only`` trains the last answer alone.
    ``alternatives`` are further answers as right as the last one: an evaluation takes them, nothing is trained on them.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    rejected: str | None = None
    last_only: bool = False
    alternatives: tuple[str, ...] = ()

    def map(self, change: Callable[[str], str]) -> Document:
        """The document with every text changed."""
        if self.text is not None:
            return Document(text=change(self.text))
        messages = tuple(Message(role=m["role"], content=change(m["content"])) for m in self.messages)
        rejected = None if self.rejected is None else change(self.rejected)
        alternatives = tuple(map(change, self.alternatives))
        return replace(self, messages=messages, rejected=rejected, alternatives=alternatives)

    def halves(self) -> tuple[Document, ...]:
        """The conversation with the preferred and the one with the rejected answer; any other document is itself."""
        if self.rejected is None:
            return (self,)
        answers = (self.messages[-1], Message(role="assistant", content=self.rejected))
        return tuple(Document(messages=(*self.messages[:-1], answer), last_only=True) for answer in answers)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the document."""
        if self.text is not None:
            return (self.text,)
        last = () if self.rejected is None else (self.rejected,)
        return (*(message["content"] for message in self.messages), *last)

    @property
    def joined(self) -> str:
        """All texts in one, a conversation's messages as paragraphs."""
        return "\n\n".join(self.texts)

    @property
    def size(self) -> int:
        """UTF-8 bytes of the texts, without anything that a template adds."""
        return sum(len(part.encode("utf-8", "surrogatepass")) for part in self.texts)


class BrokenRows:
    """The rows of a source that could not be read: counted, and too many once they are more than its recipe allows."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.count = 0
        self.first: list[str] = []

    def add(self, place: str, reason: str) -> None:
        """Count a row. Raises :class:`DataError` where it is one too many, naming the first ones."""
        self.count += 1
        if len(self.first) < _BROKEN_SHOWN:
            self.first.append(f"{place}: {reason}")
        limit = self._source.max_broken_lines
        if self.count > limit:
            some = "\n".join(f"  - {broken}" for broken in self.first)
            raise DataError(
                f"{self._source.path} has more than {limit} broken rows, the first of them:\n{some}"
                if limit
                else self.first[0],
                hint="Mend the file, or set `max_broken_lines` to skip and count so many.",
            )


def read_documents(
    source: Source, *, replace: Mapping[str, str], seed: int, broken: BrokenRows | None = None
) -> Iterator[Document]:
    """All documents of a source in file order. Raises :class:`DataError` naming the file and the line."""
    broken = broken or BrokenRows(source)
    if source.format == "qa":
        for _, drawn in question_documents(source, seed, broken):
            yield drawn
        return
    for row in source_rows(source):
        try:
            document = row_document(row, source, replace)
        except BrokenRowError as error:
            broken.add(row.place, str(error))
        else:
            if document:
                yield document


def source_rows(source: Source, on_read: OnRead = lambda _: None) -> Iterator[Row]:
    """All rows of all files of a source. Raises :class:`DataError` for files that are missing or damaged."""
    columns, optional = _columns(source)
    for file in find_files(source.path, source.kind).files:
        if file.kind in ("text", "markdown", "html") and source.format != "text":
            raise DataError(f"{file.path} holds running text, not rows of the format {source.format!r}.")
        yield from read_rows(file, columns=columns, optional=optional, encoding=source.encoding, on_read=on_read)


def _columns(source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of a Parquet file that the format needs, and those that it may have; all others stay unread."""
    keys = {"text": source.text_key, **source.fields}
    needed = [name for name in FORMAT_KEYS[source.format] if name not in (*_MESSAGE_KEYS, *_OPTIONAL_KEYS)]
    may_have = [name for name in FORMAT_KEYS[source.format] if name in _OPTIONAL_KEYS]
    (needed if source.only else may_have).append("source")
    columns, optional = (
        tuple(dict.fromkeys(keys.get(name, name).partition(".")[0] for name in names)) for names in (needed, may_have)
    )
    return columns, tuple(name for name in (*optional, "tools") if name not in columns)


def row_document(row: Row, source: Source, replace: Mapping[str, str]) -> Document | None:
    """What a row says; None where the source leaves it out. Raises :class:`BrokenRowError`."""
    content = _named(row, source)
    if source.only and content.get("source") not in source.only:
        return None
    with _explain_row(source):
        return _document(content, source, replace)


def _named(row: Row, source: Source) -> dict[str, Any]:
    """The row's keys and values under Gale's own names."""
    content = row.parse()
    if row.kind in ("text", "markdown", "html"):
        return content
    fields = source.fields if source.text_key == "text" else {"text": source.text_key, **source.fields}
    if not fields:
        return content
    named = dict(content)
    for name, key in fields.items():
        if name in _MESSAGE_KEYS:
            continue
        value: Any = content
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                if name in _OPTIONAL_KEYS:
                    value = None
                    break
                raise BrokenRowError(f"not a row of the format {source.format!r}: {key!r} is missing.")
            value = value[part]
        named[name] = value
    return named


def _document(row: dict[str, Any], source: Source, replace: Mapping[str, str]) -> Document | None:
    if source.format == "text":
        return Document(text=_filled(_text(row, "text"), replace))
    if source.format == "parallel":
        return Document(text=_filled(f"{_text(row, 'en')}\n{_text(row, 'zh')}", replace))
    if source.format == "instruction":
        parts = [_text(row, "instruction"), _text(row, "input") if row.get("input") else ""]
        task = "\n\n".join(part for part in parts if part)
        return _exchange(_filled(task, replace), _filled(_text(row, "output"), replace))
    if row.get("tools"):
        return None  # conversations with tools come with the tool-calling stage
    if source.format == "preference":
        return _preference(row, source, replace)
    return Document(messages=_messages(row["messages"], source, replace))


def _preference(row: dict[str, Any], source: Source, replace: Mapping[str, str]) -> Document:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    chosen, rejected = (_filled(_text(row, key), replace) for key in ("chosen", "rejected"))
    answer = Message(role="assistant", content=chosen)
    return Document(messages=(*_messages(prompt, source, replace), answer), rejected=rejected)


def _messages(rows: list[dict[str, Any]], source: Source, replace: Mapping[str, str]) -> tuple[Message, ...]:
    role_key, content_key = source.fields.get("role", "role"), source.fields.get("content", "content")
    messages = []
    for message in rows:
        role = message[role_key]
        if role not in _ROLES:
            role = _ROLE_ALIASES.get(role) if isinstance(role, str) else None
        if role is None:
            raise ValueError(f"unknown role {message[role_key]!r}")
        content = "" if message[content_key] is None else _text(message, content_key)
        messages.append(Message(role=role, content=_filled(content, replace)))
    return tuple(messages)


@contextlib.contextmanager
def _explain_row(source: Source) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BrokenRowError(f"not a row of the format {source.format!r}: {reason}.") from error


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(value := row[key], str):
        raise TypeError(f"{key!r} is not text")
    return value


def _filled(text: str, replace: Mapping[str, str]) -> str:
    for placeholder, value in replace.items():
        text = text.replace(placeholder, value)
    return text


def question_documents(
    source: Source, seed: int, broken: BrokenRows, on_read: OnRead = lambda _: None
) -> Iterator[tuple[str, Document]]:
    """Conversations drawn from the rows of a source of questions, each with its place. All rows are held in memory."""
    questions = source.questions
    assert questions is not None
    rows: list[tuple[str, dict[str, Any]]] = []
    for row in source_rows(source, on_read):
        try:
            content = _named(row, source)
        except BrokenRowError as error:
            broken.add(row.place, str(error))
            continue
        if not source.only or content.get("source") in source.only:
            rows.append((row.place, content))
    # A row without one is broken when its turn comes; others must not draw its.
    contexts = [context for _, content in rows if isinstance(context := content.get("context"), str)]
    unusable: set[str] = set()
    for variant, (index, (place, content)) in itertools.product(range(questions.variants), enumerate(rows)):
        # A generator of its own for each row, so that a change elsewhere leaves this row's document as it was.
        name = f"{seed}/{source.path.name}/{index}" + (f"/{variant}" if variant else "")
        draw = random.Random(name)  # noqa: S311
        try:
            with _explain_row(source):
                document = _question_document(content, contexts, questions, draw)
        except BrokenRowError as error:
            if place not in unusable:  # each variant would count it again
                unusable.add(place)
                broken.add(place, str(error))
            continue
        if document:
            yield place, document


def _question_document(
    row: dict[str, Any], contexts: list[str], questions: QuestionTemplates, draw: random.Random
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
    others = (_text(other, "text").strip() for other in row["answers"][1:])
    first, *alternatives = dict.fromkeys(_sentence(text) for text in (answer, *others) if text)
    asked = _exchange(prompt.format(context=context, question=question), first)
    return replace(asked, alternatives=tuple(alternatives))


def _sentence(answer: str) -> str:
    """A span of a passage as a reply: with a capital and a full stop."""
    ending = "。" if re.search(r"[\u4e00-\u9fff]", answer) else "."
    answer = answer if answer[-1] in "。.!?！？" else answer + ending
    return answer[0].upper() + answer[1:]


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
