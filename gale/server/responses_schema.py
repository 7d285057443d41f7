"""The body of ``POST /v1/responses``, and what a response says of its request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from gale.server.errors import ApiError, invalid, invalid_fields
from gale.server.field_checks import INT64, Body, Parameters, Refused, at_most
from gale.server.openai_sampling import Probability, Temperature
from gale.server.openai_schema import MOST_IDENTIFIER_CHARACTERS, MOST_METADATA, MOST_TOP_LOGPROBS, ChatRequest
from gale.server.openai_tools import MOST_TOOLS, FunctionName

FEWEST_OUTPUT_TOKENS = 16  # OpenAI's
LOGPROBS = "message.output_text.logprobs"
# What the checks of a chat call what is called otherwise here.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}


def _conversation_id(value: Any) -> Any:
    """A conversation's id, or the object that holds it."""
    return value.get("id") if isinstance(value, dict) else value


class FunctionTool(Body):
    """A function that the model may call; OpenAI's own tools are not here."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Body):
    """How the answer must look."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Body):
    """OpenAI pads its events against eavesdroppers who count bytes unless told not to; Gale does not."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Parameters):
    """The request, checked field by field."""

    unsupported: ClassVar[Refused] = {
        "context_management": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "personality": (),
        "prompt": (),
        "prompt_cache_options": (),
        "reasoning": ({}, {"effort": "none"}, {"effort": None, "summary": None}),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }

    model: str
    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Annotated[str | None, BeforeValidator(_conversation_id)] = None
    max_output_tokens: Annotated[int | None, Field(ge=FEWEST_OUTPUT_TOKENS, lt=INT64)] = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP_LOGPROBS)] = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    tools: Annotated[list[FunctionTool] | None, at_most(MOST_TOOLS)] = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str] | None, at_most(MOST_METADATA)] = None
    user: str | None = None
    safety_identifier: Annotated[str | None, Field(max_length=MOST_IDENTIFIER_CHARACTERS)] = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def check(self) -> None:
        """What concerns several fields. Raises :class:`ApiError` 400."""
        if self.previous_response_id is not None and self.conversation is not None:
            raise invalid("conversation", "give it or 'previous_response_id', not both")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "it is only allowed together with 'stream': true")
        if self.background and self.stream:
            raise invalid("background", "a response in the background cannot be streamed; ask for it by its id")
        if self.background and self.store is False:
            raise invalid("background", "a response in the background must be stored")

    def chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """The same as a chat request, whose checks and limits hold here too. Raises :class:`ApiError` 400."""
        wants_scores = LOGPROBS in (self.include or ())
        body = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": wants_scores,
            "top_logprobs": self.top_logprobs if wants_scores else None,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": _chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
        }
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise renamed(invalid_fields(error.errors(include_url=False, include_input=False))) from error

    def _response_format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text else None
        if form is None:
            return None
        if form.type != "json_schema":
            return {"type": form.type}
        for name, value in (("name", form.name), ("schema", form.schema_)):
            if value is None:
                path = f"text.format.{name}"
                message = f"Missing required parameter: '{path}'."
                raise ApiError(400, message, code="missing_required_parameter", param=path)
        return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}


def renamed(error: ApiError) -> ApiError:
    """An error of a chat's checks in the words of this API."""
    for chat, here in _NAMES.items():
        if error.param is not None and (error.param == chat or error.param.startswith((f"{chat}.", f"{chat}["))):
            error.message = error.message.replace(f"'{error.param}'", f"'{here}{error.param[len(chat) :]}'")
            error.param = here + error.param[len(chat) :]
            break
    return error


def response_object(request: ResponseRequest, response_id: str, created: int, model: str) -> dict[str, Any]:
    """A response that has not begun. Every field has a value: clients with strict schemas refuse null for most."""
    form = request.text.format if request.text and request.text.format else TextFormat(type="text")
    shown = {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "queued" if request.background else "in_progress",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "conversation": {"id": request.conversation} if request.conversation else None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True), "verbosity": "medium"},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": [{"strict": None, "parameters": None, **tool.model_dump()} for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "metadata": request.metadata or {},
    }
    return {**shown, "user": request.user} if request.user else shown


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _chat_choice(choice: Any) -> Any:
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": list(tools)}:
            named = [_chat_choice(tool) for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    return choice
