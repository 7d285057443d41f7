"""Items of the Responses API: what clients send, as it is kept and shown, and as messages for the model.

OpenAI calls everything in a conversation an item: messages, calls of functions, their outputs, reasoning.
"""

from __future__ import annotations

from typing import Any

from gale.platform.ids import new_id
from gale.platform.responses import Item
from gale.server.errors import ApiError, invalid

MOST_ITEMS = 2048
_ROLES = ("user", "system", "developer", "assistant")


def to_items(given: Any, where: str) -> list[Item]:
    """``input`` as it was sent, as items with ids of their own. Raises :class:`ApiError` 400 naming the path."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise invalid(where, "it must be a text or an array of items")
    if len(given) > MOST_ITEMS:
        raise invalid(where, f"it may have at most {MOST_ITEMS} items")
    return [_item(each, f"{where}[{place}]") for place, each in enumerate(given)]


def to_chat(items: list[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Items as the messages of a chat request; calls that stand together are one message."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    thought: str | None = None
    for item in items:
        match item["type"]:
            case "reasoning":
                thought = "".join(part["text"] for part in item.get("content", ()))
                continue
            case "message":
                text = "".join(part["text"] for part in item["content"])
                messages.append({"role": item["role"], "content": text})
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant" and thought is None:
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
        thought = None
    return messages


def _item(given: Any, where: str) -> Item:
    if not isinstance(given, dict):
        raise invalid(where, "it must be an object")
    match given.get("type", "message"):
        case "message":
            role = given.get("role")
            if role not in _ROLES:
                raise invalid(f"{where}.role", f"it must be one of {', '.join(_ROLES)}")
            kind = "output_text" if role == "assistant" else "input_text"
            text = _text(given.get("content"), f"{where}.content")
            part: Item = {"type": kind, "text": text}
            if role == "assistant":
                part |= {"annotations": [], "logprobs": []}
            return {
                "id": new_id("msg"),
                "type": "message",
                "role": role,
                "status": "completed",
                "content": [part],
            }
        case "function_call":
            values = {name: _string(given, name, where) for name in ("call_id", "name", "arguments")}
            return {"id": new_id("fc"), "type": "function_call", "status": "completed", **values}
        case "function_call_output":
            output = _text(given.get("output"), f"{where}.output")
            call_id = _string(given, "call_id", where)
            return {
                "id": new_id("fco"),
                "type": "function_call_output",
                "status": "completed",
                "call_id": call_id,
                "output": output,
            }
        case "reasoning":
            parts = given.get("content") or []
            text = _text(parts, f"{where}.content") if parts else ""
            content = [{"type": "reasoning_text", "text": text}] if text else []
            return {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": content}
        case kind:
            raise ApiError(
                400,
                f"Items of type '{str(kind)[:64]}' are not supported.",
                code="unsupported_parameter",
                param=f"{where}.type",
            )


def _text(content: Any, where: str) -> str:
    """A text, or text parts as one."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(where, "it must be a text or an array of text parts")
    texts: list[str] = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "reasoning_text", "text"):
            raise invalid(f"{where}[{place}].type", "only text parts are supported by this model")
        texts.append(_string(part, "text", f"{where}[{place}]"))
    return "".join(texts)


def _string(given: dict[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if value is None:
        path = f"{where}.{name}"
        raise ApiError(400, f"Missing required parameter: '{path}'.", code="missing_required_parameter", param=path)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name}", "it must be a string")
    return value
