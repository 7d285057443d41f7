"""Tools and structured answers in a chat's body.

They are OpenAI's ``tools``, ``tool_choice`` and ``response_format`` and, for what OpenAI lacks, vLLM's
``structured_outputs`` (``guided_...`` in its older releases).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from gale.engine.request import Grammar, Tools
from gale.server.errors import ApiError, invalid
from gale.server.field_checks import Body, Parameters, at_most

MOST_TOOLS = 128
MOST_OPTIONS = 10_000

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool, which here is always a function."""

    type: Literal["function"]
    function: Function


class ToolChoice(BaseModel):
    """Whether to call, and ``only`` which functions if not all."""

    mode: Literal["none", "auto", "required"]
    only: frozenset[str] | None = None
    single: bool = False


def _tool_choice(value: Any) -> Any:
    """OpenAI's ways to write a choice: a mode, a tool that must be called, or a mode with some of the tools."""
    match value:
        case None | ToolChoice():
            return value
        case "none" | "auto" | "required":
            return ToolChoice(mode=value)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice(mode="required", only=frozenset({name}), single=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            names = [tool.get("function", {}).get("name") for tool in tools if _names_function(tool)]
            if len(names) == len(tools) and names:
                return ToolChoice(mode=mode, only=frozenset(names))
    raise ValueError("it must be 'none', 'auto', 'required', or an object that names functions of 'tools'")


def _names_function(tool: Any) -> bool:
    match tool:
        case {"type": "function", "function": {"name": str()}}:
            return True
    return False


class SchemaFormat(Body):
    """A JSON Schema with a name."""

    name: FunctionName
    schema_: dict[str, Any] = Field(alias="schema")
    # Every schema is enforced as if it were strict.
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's structured answers."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's: exactly one of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str] | None, at_most(MOST_OPTIONS)] = None
    grammar: str | None = None


class ToolFields(Parameters):
    """The fields themselves; all may be null."""

    tools: Annotated[list[Tool] | None, at_most(MOST_TOOLS)] = None
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str] | None, at_most(MOST_OPTIONS)] = None
    guided_grammar: str | None = None

    def callable_tools(self) -> Tools | None:
        """What the engine is told of tools. Raises :class:`ApiError` 400."""
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise invalid("tools", "two functions have the same name")
        choice = self.tool_choice or ToolChoice(mode="auto")
        if not names and choice.mode == "required":
            raise invalid("tool_choice", "there are no 'tools' to choose from")
        if choice.only is not None and not choice.only.issubset(names):
            raise invalid("tool_choice", "it names a function that is not among 'tools'")
        if not self.tools or choice.mode == "none":
            return None
        return Tools(
            tuple(tool.function.model_dump(exclude_none=True) for tool in self.tools),
            required=choice.mode == "required",
            only=choice.only,
            parallel=self.parallel_tool_calls is not False and not choice.single,
        )

    def grammar(self) -> tuple[str, Grammar] | None:
        """What an answer must look like, and the field that says so. Raises :class:`ApiError` 400."""
        found: list[tuple[str, Grammar]] = []
        if (form := self.response_format) is not None and form.type == "json_object":
            found.append(("response_format", _schema({"type": "object"})))
        elif form is not None and form.type == "json_schema":
            if form.json_schema is None:
                path = "response_format.json_schema"
                message = f"Missing required parameter: '{path}'."
                raise ApiError(400, message, code="missing_required_parameter", param=path)
            found.append(("response_format", _schema(form.json_schema.schema_)))
        extras = self.structured_outputs or StructuredOutputs()
        for where, schema, regex, choice, lark in (
            ("structured_outputs", extras.json_, extras.regex, extras.choice, extras.grammar),
            ("guided_json", self.guided_json, None, None, None),
            ("guided_regex", None, self.guided_regex, None, None),
            ("guided_choice", None, None, self.guided_choice, None),
            ("guided_grammar", None, None, None, self.guided_grammar),
        ):
            found += [(where, _schema(schema))] if schema is not None else []
            found += [(where, Grammar("regex", regex))] if regex is not None else []
            found += [(where, Grammar("choice", tuple(choice)))] if choice is not None else []
            found += [(where, Grammar("lark", lark))] if lark is not None else []
        if len(found) > 1:
            raise invalid(found[1][0], "an answer can have one form only")
        return found[0] if found else None


def _schema(schema: dict[str, Any] | str) -> Grammar:
    return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
