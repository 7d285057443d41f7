"""The body of ``POST /v1/chat/completions``, field by field.

Types are strict (``"max_tokens": true`` is no number) and every optional field may be null.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gale.server.field_checks import INT64, Body, Refused, at_most, stop_list
from gale.server.openai_sampling import SamplingFields
from gale.server.openai_tools import ToolFields

MOST_MESSAGES = 2048
MOST_STOPS = 4
MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20
MOST_TOOL_CALLS = 128
MOST_METADATA = 16
MOST_IDENTIFIER_CHARACTERS = 64
MOST_STOP_CHARACTERS = 256


def _text_of(content: Any) -> Any:
    """A list of text parts as one string; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _problem(f"[{index}].type", "only parts of type 'text' are supported by this model")
        if not isinstance(part.get("text"), str):
            raise _problem(f"[{index}].text", "a text part needs its text as a string")
        texts.append(part["text"])
    if not texts:
        raise _problem("", "an array of content parts must not be empty")
    return "".join(texts)


def _problem(path: str, message: str) -> PydanticCustomError:
    # The message is passed as a value, since braces in a template would be taken for placeholders.
    return PydanticCustomError("content_part", "{message}", {"path": path, "message": message})


Content = Annotated[str, BeforeValidator(_text_of)]
StopString = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
TokenCount = Annotated[int, Field(ge=1, lt=INT64)]


class FunctionCall(Body):
    """What a past answer called."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in a past answer."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Body):
    """One message. An assistant's content may be null if it called tools; a tool's names the call it answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall] | None, at_most(MOST_TOOL_CALLS)] = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class StreamOptions(Body):
    """Whether a last chunk brings the token counts."""

    include_usage: bool | None = None


class ChatRequest(SamplingFields, ToolFields):
    """The request, checked field by field; what concerns several fields or the model follows in openai_request."""

    unsupported: ClassVar[Refused] = {
        "add_generation_prompt": (True,),
        "allowed_token_ids": (),
        "audio": (),
        "bad_words": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "ignore_eos": (False,),
        "min_tokens": (0,),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_logprobs": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "truncate_prompt_tokens": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    # vLLM's: tokens in logprobs stand as "token_id:N", for callers that need ids.
    return_tokens_as_token_ids: bool | None = None
    stop: Annotated[list[StopString], BeforeValidator(stop_list), Field(default=[], max_length=MOST_STOPS)]
    # Labels and hints, which change no answer: what prompts share is kept for all of them anyway.
    user: str | None = None
    safety_identifier: Annotated[str | None, Field(max_length=MOST_IDENTIFIER_CHARACTERS)] = None
    metadata: Annotated[dict[str, str] | None, at_most(MOST_METADATA)] = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream's last chunk is to carry the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
