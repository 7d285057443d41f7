"""Reading an answer while it is written: what is said, what is only thought, and which tools are called.

A marker that is a token of the model's own counts only as that token: a model that quotes ``<tool_call>`` letter by
letter calls nothing. To tell them apart, such tokens are streamed as private-use characters, which
:attr:`AnswerReader.shown` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal

from gale.text.call_syntax import THINK_CLOSES, THINK_OPENS, CallSyntax
from gale.text.tokenizer import Tokenizer

_FIRST_STAND_IN = 0xE0F3  # the template's own stand before it
_NAME = r'"name"\s*:\s*("(?:[^"\\]|\\.)*")'


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer. A call is first its "name", whole, and then its "arguments" as JSON text, bit by bit."""

    kind: Literal["text", "reasoning", "name", "arguments"]
    text: str
    call: int = 0


class AnswerReader:
    """Takes an answer's text apart. ``begun`` says that the prompt has opened the thinking already.

    Half a marker is never let through. What begins like a call and turns out to be none, such as broken JSON, is text
    like any other, with its marker. Of ``bare`` calls only those of known ``functions`` count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        syntax: CallSyntax | None,
        *,
        functions: Set[str] = frozenset(),
        thinks: bool = False,
        begun: bool = False,
    ) -> None:
        self._syntax = syntax
        self._functions = functions
        self._thinks = thinks
        self.shown: dict[int, str] = {}
        self._spelling: dict[str, str] = {}
        self._meaning: dict[int, str] = {}
        for marker in [THINK_OPENS, THINK_CLOSES] * thinks + (syntax.markers if syntax else []):
            stand_in = chr(_FIRST_STAND_IN + len(self._spelling))
            token = tokenizer.token_id(marker) if marker in tokenizer.control_tokens else None
            self._spelling[marker] = marker if token is None else stand_in
            if token is not None:
                self.shown[token] = stand_in
                self._meaning[ord(stand_in)] = marker
        self._head = self._head_pattern()
        self._held = ""
        self._marker = ""  # of the call that is being read, for the case that it is none
        self._calls = 0
        self._scanner = _Scanner()
        self._step = self._read_thought if begun else self._read_start if thinks or self._bare else self._read_text
        self._trim = begun  # whether white space at the beginning of what comes is to be left out

    @property
    def _bare(self) -> bool:
        return self._syntax is not None and self._syntax.bare

    def push(self, text: str) -> list[Piece]:
        """What has become certain with ``text``."""
        return self._read(text, last=False)

    def end(self) -> list[Piece]:
        """What was held back, once nothing follows."""
        return self._read("", last=True)

    def _read(self, text: str, *, last: bool) -> list[Piece]:
        self._held += text
        self._pieces: list[Piece] = []
        while self._step(last):
            pass
        return self._pieces

    def _emit(self, kind: Literal["text", "reasoning", "name", "arguments"], text: str, call: int = 0) -> None:
        if text or kind == "name":
            self._pieces.append(Piece(kind, text.translate(self._meaning), call))

    # Each step looks at what is held, and says whether another step may get on.

    def _read_start(self, last: bool) -> bool:
        """An answer's first characters decide whether it is a thought or a call without a marker."""
        opens, text = self._spelling.get(THINK_OPENS), self._held.lstrip()
        if opens and text.startswith(opens):
            self._held, self._trim, self._step = text[len(opens) :], True, self._read_thought
            return True
        if not last and (not text or (opens and opens.startswith(text))):
            return False
        if self._bare and text.startswith("{"):
            self._held, self._marker = text, ""
            self._begin_call()
        else:
            self._step = self._read_text
        return True

    def _read_thought(self, last: bool) -> bool:
        self._trim_held()
        before, closes, after = self._held.partition(self._spelling[THINK_CLOSES])
        if closes:
            self._emit("reasoning", before.rstrip())
            self._held, self._trim = after, True
            self._step = self._read_answer_start
            return True
        self._let_through("reasoning", self._spelling[THINK_CLOSES], last)
        return False

    def _read_answer_start(self, last: bool) -> bool:
        """Behind a thought, where a call without a marker may stand too."""
        self._trim_held()
        if not self._held:
            return False
        if self._bare and self._held.startswith("{"):
            self._marker = ""
            self._begin_call()
        else:
            self._step = self._read_text
        return True

    def _read_text(self, last: bool) -> bool:
        self._trim_held()
        if self._syntax is None:
            self._emit("text", self._held)
            self._held = ""
            return False
        opening = self._spelling[self._syntax.opening]
        before, found, after = self._held.partition(opening)
        if found:
            self._emit("text", before.rstrip())
            self._held, self._marker = after, self._syntax.opening
            self._begin_call()
            return True
        self._let_through("text", opening, last)
        return False

    def _begin_call(self) -> None:
        self._scanner = _Scanner()
        self._step = self._read_head

    def _read_head(self, last: bool) -> bool:
        """The beginning of a call up to its arguments, or a whole call that is written in another order."""
        if found := self._head.match(self._held):
            name = json.loads(found[1]) if found[1].startswith('"') else found[1]
            if not self._known(name):
                return self._no_call()
            self._emit("name", name, self._calls)
            self._held, self._scanner, self._step = self._held[found.end() :], _Scanner(), self._read_arguments
            return True
        syntax, text = self._syntax, self._held.lstrip()
        assert syntax is not None, "only with a syntax there are calls"
        if syntax.named:
            return self._no_call() if last or len(text) > 256 else False
        if syntax.listed and text.startswith("["):
            text = text[1:].lstrip()
        if text and not text.startswith("{"):
            return self._no_call()
        end = self._scanner.scan(self._held)
        if end is None:
            return self._no_call() if last else False
        try:
            call = json.loads(self._held[len(self._held) - len(text) : end])
        except (ValueError, RecursionError):
            return self._no_call()
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(call.get("name"), str) or not self._known(call["name"]):
            return self._no_call()
        self._emit("name", call["name"], self._calls)
        self._emit("arguments", arguments if isinstance(arguments, str) else _json(arguments), self._calls)
        self._held, self._step = self._held[end:], self._read_after
        self._calls += 1
        return True

    def _read_arguments(self, last: bool) -> bool:
        end = self._scanner.scan(self._held)
        self._emit("arguments", self._held[:end], self._calls)
        if end is None:
            self._held, self._scanner.place = "", 0
            return False
        self._held = self._held[end:]
        self._calls += 1
        assert self._syntax is not None, "only with a syntax there are calls"
        # What may follow within the object, such as an id, is of no use to anybody.
        self._scanner, self._step = _Scanner(depth=1), self._read_after if self._syntax.named else self._read_tail
        return True

    def _read_tail(self, last: bool) -> bool:
        end = self._scanner.scan(self._held)
        if end is None:
            return False
        self._held, self._step = self._held[end:], self._read_after
        return True

    def _read_after(self, last: bool) -> bool:
        """Behind a call: another one, or the end of calls."""
        syntax, text = self._syntax, self._held.lstrip()
        assert syntax is not None, "only with a syntax there are calls"
        closing = "]" if syntax.listed else self._spelling.get(syntax.closing, "")
        if not text or (closing.startswith(text) and closing != text):
            if last:
                self._held = ""
            return False
        if syntax.separator and text.startswith(syntax.separator):
            self._held, self._marker = text[len(syntax.separator) :], syntax.separator
            self._begin_call()
        else:
            self._held, self._trim, self._step = text.removeprefix(closing), True, self._read_text
        return True

    def _known(self, name: str) -> bool:
        return bool(self._marker) or name in self._functions

    def _no_call(self) -> bool:
        self._emit("text", self._marker)
        self._trim, self._step = False, self._read_text
        return True

    def _trim_held(self) -> None:
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held

    def _let_through(self, kind: Literal["text", "reasoning"], marker: str, last: bool) -> None:
        """Emit what is held but for what may begin ``marker``, and white space, which before one is left out."""
        keep = 0 if last else next((n for n in range(len(marker) - 1, 0, -1) if self._held.endswith(marker[:n])), 0)
        sure = self._held[: len(self._held) - keep]
        sure = sure if last and not (self._calls or kind == "reasoning") else sure.rstrip()
        self._emit(kind, sure)
        self._held = "" if last else self._held[len(sure) :]

    def _head_pattern(self) -> re.Pattern[str]:
        if self._syntax is not None and self._syntax.named:
            spelled = {marker: re.escape(self._spelling[marker]) for marker in self._syntax.markers}
            return re.compile(rf"\s*([\w.-]+)\s*(?:{spelled['[CALL_ID]']}\w*)?{spelled[self._syntax.named]}\s*(?=\{{)")
        return re.compile(rf'\s*\[?\s*\{{\s*{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')


class _Scanner:
    """Finds where a JSON object ends, going on where it stopped."""

    def __init__(self, depth: int = 0) -> None:
        self.place = 0
        self._depth = depth
        self._quoted = False
        self._escaped = False

    def scan(self, text: str) -> int | None:
        """The place behind the closing brace; None if that has not come yet. ``text`` may only grow at its end."""
        for place in range(self.place, len(text)):
            character = text[place]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        self.place = len(text)
        return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
