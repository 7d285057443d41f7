"""The body of ``POST /v1/completions``: raw text or tokens to continue, field by field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from gale.server.field_checks import INT64, Refused, stop_list
from gale.server.openai_sampling import SamplingFields
from gale.server.openai_schema import StopString, StreamOptions

# Choices of one request, all prompts together. Evaluation harnesses send batches of prompts.
MOST_CHOICES = 256
# OpenAI takes four; lm-evaluation-harness sends all that a task names, and the end token's text.
MOST_STOPS = 32
# OpenAI's newer limit for chat; its five for completions would be short for research.
MOST_LOGPROBS = 20


def prompt_list(most: int) -> Callable[[Any], Any]:
    """Takes the four ways to write up to ``most`` prompts as one: a list of strings and token lists."""
    return partial(_prompts, most)


def _prompts(most: int, value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("it must be a string, a list of strings, a list of tokens or a list of such lists")
    if not value:
        raise ValueError("it must not be empty")
    if all(_is_token(item) for item in value):
        return [value]
    if len(value) > most:
        raise ValueError(f"at most {most} prompts are taken at once")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and item and all(_is_token(token) for token in item) for item in value):
        return value
    raise ValueError("it must hold only strings, only tokens, or only lists of at least one token")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < INT64


class CompletionRequest(SamplingFields):
    """The request, checked field by field; what concerns several fields or the model follows in openai_completions."""

    unsupported: ClassVar[Refused] = {
        "best_of": (1,),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_regex": (),
        "ignore_eos": (False,),
        "min_tokens": (0,),
        "prompt_logprobs": (),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "suffix": ("",),
    }
    advice: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("guided_choice", "guided_grammar", "guided_json", "guided_regex", "response_format", "structured_outputs"),
        "POST /v1/chat/completions takes it.",
    )

    model: str
    prompt: Annotated[list[str | list[int]], BeforeValidator(prompt_list(MOST_CHOICES))]
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Annotated[list[StopString], BeforeValidator(stop_list), Field(default=[], max_length=MOST_STOPS)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    # vLLM's: tokens in logprobs stand as "token_id:N", for callers that need ids
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream's last chunk is to carry the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
