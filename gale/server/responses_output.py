"""The output items of one response as they grow, and the events that a stream shows of them.

The order is OpenAI's: an item is added, its part is added, deltas, then the text, the part and the item as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gale.engine.request import ReasoningDelta, TextDelta, TokenScore, ToolCallDelta
from gale.platform.ids import new_id

Event = dict[str, Any]


class Output:
    """Gathers deltas into ``items``; every method yields what a stream is to say, without its sequence number.

    ``logprobs`` turns scores into OpenAI's objects; None where they were not asked for.
    """

    def __init__(self, logprobs: Callable[[list[TokenScore]], list[dict[str, Any]]] | None = None) -> None:
        self.items: list[dict[str, Any]] = []
        self._logprobs = logprobs
        self._call: int | None = None  # the engine's number of the call that is open
        self._open = False

    def add(self, delta: TextDelta | ReasoningDelta | ToolCallDelta) -> Iterator[Event]:
        """Take the next delta."""
        match delta:
            case ReasoningDelta(text):
                yield from self._begin("reasoning")
                yield from self._grow("reasoning_text", text)
            case TextDelta(text, score) if text or score is not None:
                yield from self._begin("message")
                scores = self._logprobs([score]) if self._logprobs and score is not None else []
                yield from self._grow("output_text", text, scores)
            case ToolCallDelta(index, call_id, name, arguments):
                if index != self._call:
                    yield from self.close()
                    call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                    yield from self._add({"id": new_id("fc"), "status": "in_progress", **call})
                    self._call = index
                self.items[-1]["arguments"] += arguments
                if arguments:
                    yield self._event("response.function_call_arguments.delta", delta=arguments)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """End the item that is open, if one is, as ``status`` says."""
        if not self._open:
            return
        self._open, self._call = False, None
        item = self.items[-1]
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done)
        else:
            part = item["content"][0]
            logprobs = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
            yield self._event(f"response.{part['type']}.done", content_index=0, text=part["text"], **logprobs)
            yield self._event("response.content_part.done", content_index=0, part=dict(part))
        if item["type"] != "reasoning":
            item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}

    def _begin(self, kind: str) -> Iterator[Event]:
        if self._open and self.items[-1]["type"] == kind:
            return
        yield from self.close()
        if kind == "message":
            head = {"id": new_id("msg"), "type": kind, "role": "assistant", "status": "in_progress", "content": []}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            head = {"id": new_id("rs"), "type": kind, "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        yield from self._add(head)
        yield self._event("response.content_part.added", content_index=0, part=dict(part))
        self.items[-1]["content"] = [part]

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self.items.append(item)
        self._open = True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}

    def _grow(self, kind: str, text: str, scores: list[dict[str, Any]] | None = None) -> Iterator[Event]:
        part = self.items[-1]["content"][0]
        part["text"] += text
        more: dict[str, Any] = {}
        if scores is not None:
            part["logprobs"] += scores
            more["logprobs"] = scores
        yield self._event(f"response.{kind}.delta", content_index=0, delta=text, **more)

    def _event(self, kind: str, **values: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **place, **values}
