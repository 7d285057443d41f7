"""One choice of a chat as OpenAI's clients read it, gathered or as deltas."""

from __future__ import annotations

from typing import Any

from gale.engine.request import EngineFailedError, Finished, ReasoningDelta, TextDelta, TokenScore, ToolCallDelta

Delta = TextDelta | ReasoningDelta | ToolCallDelta


class Answer:
    """Gathers the deltas of one choice."""

    def __init__(self) -> None:
        self.scores: list[TokenScore] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> None:
        """Take the next one."""
        match delta:
            case TextDelta(text, score):
                self._text.append(text)
                self.scores += [] if score is None else [score]
            case ReasoningDelta(text):
                self._reasoning.append(text)
            case ToolCallDelta(_, str(call_id), str(name), arguments):
                function = {"name": name, "arguments": arguments}
                self._calls.append({"id": call_id, "type": "function", "function": function})
            case ToolCallDelta(index, _, _, arguments):
                self._calls[index]["function"]["arguments"] += arguments

    def message(self) -> dict[str, Any]:
        """The whole message; what was called or thought stands there only if there is any."""
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": None if self._calls and not text else text}
        message["refusal"] = None
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def finish_reason(self, finished: Finished) -> str:
        """See :func:`finish_reason`."""
        return finish_reason(finished, called=bool(self._calls))


def delta_object(delta: Delta) -> dict[str, Any]:
    """What a chunk of a stream shows of ``delta``; the id and the name of a call stand in its first chunk only."""
    match delta:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallDelta(index, None, _, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
        case ToolCallDelta(index, call_id, name, arguments):
            function = {"name": name, "arguments": arguments}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}


def finish_reason(finished: Finished, *, called: bool = False) -> str:
    """How an answer ended, in OpenAI's words. Raises :class:`EngineFailedError` where it has none."""
    if finished.reason == "cancelled":
        # OpenAI has no such reason, and "stop" would pass off half an answer as a whole one.
        raise EngineFailedError("The answer was cancelled before its end.")
    return "tool_calls" if called and finished.reason == "stop" else finished.reason
