"""One answer of a chat, as the model's family writes it: which grammar holds it, and which events its text becomes."""

from __future__ import annotations

import secrets
import string
from dataclasses import replace
from typing import Any

from gale.engine.grammar import Thinking
from gale.engine.request import (
    Event,
    Finished,
    GrammarError,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    ToolCallDelta,
    Tools,
)
from gale.engine.tool_grammar import tool_grammar
from gale.text.answer import AnswerReader, Piece
from gale.text.call_syntax import THINK_CLOSES, THINK_OPENS, call_syntax
from gale.text.tokenizer import Tokenizer

_ALPHANUMERIC = string.ascii_letters + string.digits


class Reply:
    """What ``template`` (its source) says about an answer to ``prompt``.

    ``sampling`` has the grammar that the tools bring; ``thinking`` frees from it what the model thinks before. Raises
    :class:`GrammarError` for tools that the template does not have.
    """

    def __init__(
        self, template: str, tokenizer: Tokenizer, prompt: list[int], sampling: SamplingParams, tools: Tools | None
    ) -> None:
        syntax = call_syntax(template) if tools else None
        grammar = sampling.grammar
        if tools is not None:
            if syntax is None:
                raise GrammarError("This model's chat template has no tools, or writes calls in an unknown way.")
            grammar = tool_grammar(syntax, tokenizer, tools, grammar)
        self.sampling = replace(sampling, grammar=grammar, prompt_logprobs=False)
        begun = tokenizer.decode(prompt[-8:], control_tokens=True).rstrip().endswith(THINK_OPENS)
        opens, closes = (
            tokenizer.token_id(marker) if marker in tokenizer.control_tokens else None
            for marker in (THINK_OPENS, THINK_CLOSES)
        )
        trained = THINK_CLOSES in template
        self.thinking: Thinking | None = None
        if opens is not None and closes is not None and (trained or begun):
            self.thinking = Thinking(opens, closes, begun)
        self._reader = AnswerReader(
            tokenizer,
            syntax,
            functions={function["name"] for function in tools.callable} if tools else frozenset(),
            thinks=trained or begun or (opens is not None and closes is not None),
            begun=begun,
        )
        self.shown = self._reader.shown

    def events(self, event: Event) -> list[Event]:
        """What an event of the engine, whose text is still in one piece, means."""
        match event:
            case TextDelta(text, score):
                pieces = self._reader.push(text)
                if score is None:
                    return [self._event(piece) for piece in pieces]
                said = "".join(piece.text for piece in pieces if piece.kind == "text")
                others = [self._event(piece) for piece in pieces if piece.kind != "text"]
                return [TextDelta(said, score), *others]
            case Finished():
                return [*(self._event(piece) for piece in self._reader.end()), event]
            case _:
                return [event]

    def _event(self, piece: Piece) -> Event:
        match piece.kind:
            case "text":
                return TextDelta(piece.text)
            case "reasoning":
                return ReasoningDelta(piece.text)
            case "name":
                # Mistral's templates take back only ids of nine such characters; others take any.
                call_id = "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
                return ToolCallDelta(piece.call, call_id, piece.text, "")
            case "arguments":
                return ToolCallDelta(piece.call, None, None, piece.text)


def tools_for_template(tools: Tools) -> list[dict[str, Any]]:
    """The functions as chat templates show them to a model."""
    return [
        {
            "type": "function",
            "function": {key: tool[key] for key in ("name", "description", "parameters") if key in tool},
        }
        for tool in tools.functions
    ]
