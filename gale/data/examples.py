"""Uploaded rows become training data: OpenAI's JSON lines for fine-tuning, each checked before anything is trained.

A row is a conversation (``messages``, ``tools``; an assistant's message may have the ``weight`` 0), a preference
(``input``, ``preferred_output``, ``non_preferred_output``) or a question for reinforcement learning (``messages`` and
whatever the grader refers to). The first two become shards as :mod:`gale.data.prepare` writes them, but nothing is
cleaned, dropped or cut: every row is trained on, or the line that cannot be is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from gale.core import files
from gale.core.errors import DataError, GaleError
from gale.data.graders import Grader
from gale.data.shards import MANIFEST, ShardWriter
from gale.data.shards import fingerprint as shards_fingerprint
from gale.text.template import PLAIN_CHAT_TEMPLATE, ChatTemplate, Message
from gale.text.tokenizer import Tokenizer

Method = Literal["supervised", "dpo", "reinforcement"]

Made = TypeVar("Made")

LEAST_ROWS = 10  # what OpenAI asks for; fewer teach nothing that would hold
MOST_LINE_BYTES = 16 * 2**20
_SHARD_TOKENS = 2**24
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content"}


class RowError(DataError):
    """A row that cannot be trained on, or a file of them; ``param`` is the parameter that named the file."""

    def __init__(self, param: str, line: int | None, reason: str) -> None:
        super().__init__(f"{param}, line {line}: {reason}." if line else f"{param}: {reason}.")
        self.param = param
        self.line = line


@dataclass(frozen=True, slots=True)
class Examples:
    """What a file came to: ``rows`` of them, their ``tokens``, and the longest row's."""

    rows: int
    tokens: int
    longest: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One document of a row."""

    ids: list[int]
    trained: list[bool]


def prepare_examples(
    method: Literal["supervised", "dpo"], sources: dict[str, tuple[str, Path]], base: Path, out: Path, *, context: int
) -> dict[str, Examples]:
    """Write the shards of ``sources`` to the folder ``out``, and say what came of each.

    ``sources`` are files by the split they become, ``train`` among them, with the parameter that named each. Rows of
    more than ``context`` tokens are refused. Raises :class:`RowError`.
    """
    tokenizer = Tokenizer.load(base)
    encode = _Encoder(tokenizer, context).conversation if method == "supervised" else _Encoder(tokenizer, context).pair
    found: dict[str, Examples] = {}
    with files.new_directory(out, marker=MANIFEST) as folder:
        tokenizer.save(folder / "tokenizer")
        splits: dict[str, Any] = {}
        for split, (param, path) in sources.items():
            writer = ShardWriter(folder, split, vocabulary_size=tokenizer.vocabulary_size, shard_tokens=_SHARD_TOKENS)
            rows = longest = 0
            for line, row in read_rows(path, param, least=LEAST_ROWS if split == "train" else 1):
                for document in _explained(encode, row, param, line):
                    writer.add(document.ids, document.trained)
                    longest = max(longest, len(document.ids))
                rows += 1
            writer.close()
            splits[split] = {
                "documents": writer.documents,
                "tokens": writer.tokens,
                "bytes": path.stat().st_size,
                "shards": writer.shards,
                **({"pairs": True} if method == "dpo" else {}),
            }
            found[split] = Examples(rows, writer.tokens, longest)
        files.write_json(
            folder / MANIFEST,
            {
                "format": 1,
                "fingerprint": shards_fingerprint(folder),
                "vocabulary_size": tokenizer.vocabulary_size,
                "splits": splits,
                "sources": [
                    {"split": split, "file": sources[split][0], "documents": facts["documents"]}
                    for split, facts in splits.items()
                ],
            },
        )
    return found


def prepare_questions(
    sources: dict[str, tuple[str, Path]], grader: Grader, base: Path, out: Path, *, context: int
) -> dict[str, Examples]:
    """Write rows for reinforcement learning as prompts of :mod:`gale.train.prompts`, ``out/{split}.jsonl``.

    Raises :class:`RowError`, also for a prompt of more than ``context`` tokens.
    """
    encoder = _Encoder(Tokenizer.load(base), context)

    def question(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
        _refuse_keys(row, "tools", "a row for reinforcement learning has none here")
        messages = _messages(row.get("messages"))
        if any(message["role"] in ("assistant", "tool") for message in messages) or messages[-1]["role"] != "user":
            raise ValueError("'messages' must be a question: system and user messages, the last one the user's")
        try:
            expected = grader.expected(row)
        except KeyError as error:
            raise ValueError(f"the grader refers to {error}, which this row lacks") from None
        return {"messages": messages, "expected": expected}, encoder.prompt_length(messages)

    found: dict[str, Examples] = {}
    with files.new_directory(out) as folder:
        for split, (param, path) in sources.items():
            rows = tokens = longest = 0
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for line, row in read_rows(path, param, least=LEAST_ROWS if split == "train" else 1):
                    prompt, length = _explained(question, row, param, line)
                    file.write(json.dumps(prompt, ensure_ascii=False) + "\n")
                    rows, tokens, longest = rows + 1, tokens + length, max(longest, length)
            found[split] = Examples(rows, tokens, longest)
    return found


def read_rows(path: Path, param: str, *, least: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines with their line numbers, from 1; empty lines are passed over.

    Raises :class:`RowError` for a line that is not one, and in the end where there were fewer than ``least``.
    """
    rows = line = 0
    with path.open("rb") as file:
        while raw := file.readline(MOST_LINE_BYTES + 1):
            line += 1
            if len(raw) > MOST_LINE_BYTES:
                raise RowError(param, line, f"it is longer than {MOST_LINE_BYTES:,} bytes")
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise RowError(param, line, "it is not UTF-8") from error
            except json.JSONDecodeError as error:
                raise RowError(param, line, f"it is not JSON: {error.msg} (column {error.colno})") from error
            except (ValueError, RecursionError) as error:
                raise RowError(param, line, "its numbers are too long, or it is nested too deeply") from error
            if not isinstance(row, dict):
                raise RowError(param, line, "it is not a JSON object")
            rows += 1
            yield line, row
    if rows < least:
        raise RowError(param, line or None, f"the file ends with {rows} examples, and at least {least} are needed")


class _Encoder:
    """Rows to token ids with the mask of what is trained."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self._template = ChatTemplate(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE, tokenizer)
        self._context = context

    def conversation(self, row: dict[str, Any]) -> list[_Encoded]:
        """A conversation as one document, with the answers of weight 1 trained."""
        _known_keys(row, {"messages", "tools", "parallel_tool_calls"})
        messages, weights = _messages(row.get("messages")), _weights(row["messages"])
        if not any(weights.values()):
            raise ValueError("there is nothing to learn: it has no assistant message with a weight other than 0")
        return [self._document(messages, _tools(row.get("tools")), weights)]

    def pair(self, row: dict[str, Any]) -> list[_Encoded]:
        """A preference as two documents, the better answer's first, with the answers trained."""
        _known_keys(row, {"input", "preferred_output", "non_preferred_output"})
        given = row.get("input")
        if not isinstance(given, dict):
            raise ValueError("'input' must be an object with 'messages'")
        _known_keys(given, {"messages", "tools", "parallel_tool_calls"}, "input.")
        before, tools = _messages(given.get("messages"), "input.messages"), _tools(given.get("tools"))
        documents = []
        for name in ("preferred_output", "non_preferred_output"):
            answer = _messages(row.get(name), name)
            if len(answer) != 1 or answer[0]["role"] != "assistant":
                raise ValueError(f"{name!r} must be a list of one assistant message")
            documents.append(self._document([*before, *answer], tools, {len(before): True}))
        if documents[0] == documents[1]:
            raise ValueError("both answers are the same, so there is nothing to prefer")
        return documents

    def prompt_length(self, messages: list[Message]) -> int:
        """Tokens of a question. Raises :class:`ValueError` where it leaves no room for an answer."""
        length = len(self._template.prompt(messages))
        if length >= self._context:
            raise ValueError(
                f"it has {length:,} tokens, and the model reads {self._context:,} at most, answer included"
            )
        return length

    def _document(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, weights: dict[int, bool]
    ) -> _Encoded:
        chat = self._template.encode(messages, tools=tools)
        if len(chat.ids) > self._context:
            raise ValueError(f"it has {len(chat.ids):,} tokens, and the model reads {self._context:,} at most")
        stretches = _stretches(chat.trained)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(stretches) != len(answers):  # a template without the marks of what the assistant wrote
            stretches = [self._stretch(messages, index, tools, chat.ids) for index in answers]
        trained = [False] * len(chat.ids)
        for index, (start, end) in zip(answers, stretches, strict=True):
            if weights.get(index):
                trained[start:end] = [True] * (end - start)
        return _Encoded(chat.ids, trained)

    def _stretch(
        self, messages: list[Message], index: int, tools: list[dict[str, Any]] | None, whole: list[int]
    ) -> tuple[int, int]:
        """Where answer ``index`` stands: between the prompt that asks for it and the conversation that ends with it."""
        prompt = self._template.prompt(messages[:index], tools=tools)
        answered = self._template.encode(messages[: index + 1], tools=tools).ids
        if answered[: len(prompt)] != prompt or whole[: len(answered)] != answered or len(answered) == len(prompt):
            raise ValueError("the model's chat template does not show which tokens the assistant wrote")
        return len(prompt), len(answered)


def _explained(work: Callable[[dict[str, Any]], Made], row: dict[str, Any], param: str, line: int) -> Made:
    try:
        return work(row)
    except ValueError as error:
        raise RowError(param, line, str(error)) from error
    except GaleError as error:  # the chat template's refusal
        raise RowError(param, line, error.message.rstrip(".")) from error


def _stretches(trained: list[bool]) -> list[tuple[int, int]]:
    """Start and end of each unbroken stretch of what is trained."""
    flags = [False, *trained, False]
    edges = [index for index in range(len(trained) + 1) if flags[index] != flags[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _messages(content: Any, where: str = "messages") -> list[Message]:
    """Messages as templates take them. Raises :class:`ValueError`."""
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where!r} must be a list with at least one message")
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(content)]


def _message(content: Any, where: str) -> Message:
    if not isinstance(content, dict):
        raise ValueError(f"'{where}' is not an object")
    _known_keys(content, _MESSAGE_KEYS, f"{where}.")
    role = content.get("role")
    if role not in _ROLES:
        raise ValueError(f"'{where}.role' must be one of {', '.join(_ROLES)}")
    for key in ("tool_calls", "weight", "reasoning_content"):
        if role != "assistant" and content.get(key) is not None:
            raise ValueError(f"'{where}.{key}' belongs to an assistant's message")
    text = _text(content.get("content"), f"{where}.content", optional=bool(content.get("tool_calls")))
    message = Message(role="system" if role == "developer" else role, content=text)
    if calls := content.get("tool_calls"):
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if content.get("tool_call_id") is not None:
        message["tool_call_id"] = _text(content["tool_call_id"], f"{where}.tool_call_id", optional=False)
    if content.get("name") is not None:
        message["name"] = _text(content["name"], f"{where}.name", optional=False)
    if content.get("reasoning_content") is not None:
        message["reasoning_content"] = _text(content["reasoning_content"], f"{where}.reasoning_content", optional=False)
    return message


def _text(content: Any, where: str, *, optional: bool) -> str:
    if isinstance(content, str):
        text = content
    elif content is None and optional:
        text = ""
    elif isinstance(content, list) and content:
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"'{where}[{index}]' must be a part of the type 'text'")
        text = "".join(part["text"] for part in content)
    else:
        raise ValueError(f"'{where}' must be text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"'{where}' contains half of a surrogate pair")
    return text


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        raise ValueError(f"'{where}' must be a list")
    for index, call in enumerate(content):
        match call:
            case {"id": str(), "type": "function", "function": {"name": str(), "arguments": str()}}:
                continue
        raise ValueError(f"'{where}[{index}]' must have an id, the type 'function', a name and arguments as text")
    return content


def _tools(content: Any) -> list[dict[str, Any]] | None:
    """Tools as a model is shown them when it is served."""
    if content is None or content == []:
        return None
    if not isinstance(content, list):
        raise ValueError("'tools' must be a list")
    shown = []
    for index, tool in enumerate(content):
        match tool:
            case {"type": "function", "function": {"name": str()} as function}:
                known = {key: function[key] for key in ("name", "description", "parameters") if key in function}
                shown.append({"type": "function", "function": known})
            case _:
                raise ValueError(f"'tools[{index}]' must have the type 'function' and a function with a name")
    return shown


def _weights(messages: list[dict[str, Any]]) -> dict[int, bool]:
    """For each assistant message, by its place, whether it is trained."""
    weights: dict[int, bool] = {}
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            weight = message.get("weight")
            if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
                raise ValueError(f"'messages[{index}].weight' must be 0 or 1")
            weights[index] = weight != 0
    return weights


def _known_keys(content: dict[str, Any], known: set[str], where: str = "") -> None:
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"'{where}{unknown[0]}' is not known here; there are {', '.join(sorted(known))}")


def _refuse_keys(row: dict[str, Any], key: str, reason: str) -> None:
    if row.get(key):
        raise ValueError(f"'{key}': {reason}")
