"""The body of ``POST /v1/messages``, in Anthropic's shape, and the same as a chat request."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from gale.server.errors import ApiError, invalid, invalid_fields
from gale.server.field_checks import INT64, Body, Parameters, Refused, at_most
from gale.server.openai_sampling import Probability
from gale.server.openai_schema import MOST_MESSAGES, MOST_STOP_CHARACTERS, ChatRequest
from gale.server.openai_tools import MOST_TOOLS, FunctionName

MOST_STOPS = 64
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

StopSequence = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class Turn(Body):
    """One message; ``content`` is a text or an array of blocks."""

    role: Literal["user", "assistant", "system"]
    content: Any


class AnthropicTool(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class AnthropicChoice(Body):
    """Whether to call, and which."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Parameters):
    """What is to be read: the part of a request that counts."""

    unsupported: ClassVar[Refused] = {
        "cache_control": ({"type": "ephemeral"},),
        "container": (),
        "context_management": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "output_config": ({},),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
    }

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: Any = None
    tools: Annotated[list[AnthropicTool] | None, at_most(MOST_TOOLS)] = None
    tool_choice: AnthropicChoice | None = None

    def chat(self, **more: Any) -> ChatRequest:
        """The same as a chat request, whose checks and limits hold here too. Raises :class:`ApiError` 400."""
        messages = [{"role": "system", "content": _text(self.system, "system")}] if self.system else []
        for place, turn in enumerate(self.messages):
            messages += _messages(turn, f"messages[{place}].content")
        choice = self.tool_choice or AnthropicChoice(type="auto")
        if choice.type == "tool" and choice.name is None:
            path = "tool_choice.name"
            raise ApiError(400, f"Missing required parameter: '{path}'.", code="missing_required_parameter", param=path)
        named = {"type": "function", "function": {"name": choice.name}}
        body = {
            "model": self.model,
            "messages": messages,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": (named if choice.type == "tool" else _CHOICES[choice.type]) if self.tool_choice else None,
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
            **more,
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise invalid_fields(error.errors(include_url=False, include_input=False)) from error


class MessagesRequest(CountRequest):
    """The whole request, checked field by field."""

    max_tokens: Annotated[int, Field(ge=1, lt=INT64)]
    stop_sequences: Annotated[list[StopSequence] | None, at_most(MOST_STOPS)] = None
    stream: bool | None = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: Annotated[int | None, Field(ge=0, lt=INT64)] = None
    # A label, which changes no answer.
    metadata: Annotated[dict[str, Any] | None, BeforeValidator(lambda value: value), at_most(16)] = None


def _messages(turn: Turn, where: str) -> list[dict[str, Any]]:
    """One message as the chat's: calls stand in an assistant's message, each result is a message of its own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    if not isinstance(turn.content, list) or not turn.content:
        raise invalid(where, "it must be a text or an array of blocks")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for place, block in enumerate(turn.content):
        path = f"{where}[{place}]"
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)} if turn.role == "assistant":
                thoughts.append(text)
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(arguments)}:
                function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
                calls.append({"id": call_id, "type": "function", "function": function})
            case {"type": "tool_result", "tool_use_id": str(call_id)} if turn.role == "user":
                text = _text(block.get("content") or "", f"{path}.content")
                results.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case _:
                raise invalid(f"{path}.type", "only blocks of text, tool_use, tool_result and thinking are supported")
    message: dict[str, Any] = {"role": turn.role, "content": "".join(texts) if texts or not calls else None}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return [*results, message] if texts or calls or thoughts else results


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts: list[str] = []
        for block in content:
            match block:
                case {"type": "text", "text": str(text)}:
                    texts.append(text)
        if len(texts) == len(content):
            return "".join(texts)
    raise invalid(where, "it must be a text or an array of text blocks")


def _chat_tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}
