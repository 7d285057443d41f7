"""The one chat template: it renders prompts, marks the tokens that are trained, and is what the engine prompts with.

A template is Jinja text in the Hugging Face convention (``messages``, ``tools``, ``add_generation_prompt``),
so any checkpoint's own template works. Ours also carries the ``{% generation %}`` tags of that convention, which
mark what the assistant wrote.

Control tokens come from the template only. Text written by people that happens to spell a control token
(``<|end|>``) is encoded as plain characters, so a user cannot close their own turn and speak as the system.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NotRequired, TypedDict

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gale.core.errors import GaleError, ModelError
from gale.text.tokenizer import Tokenizer

# Private-use code points that stand in for things while Jinja runs; people's text is cleaned of them first.
_GENERATION_OPEN, _GENERATION_CLOSE, _CONTROL = "\ue0f0", "\ue0f1", "\ue0f2"
_RESERVED = re.compile(f"[{_GENERATION_OPEN}{_GENERATION_CLOSE}{_CONTROL}]")
_DISGUISED = re.compile(f"{_CONTROL}(\\d+);")

GALE_CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|system|>' }}{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools:\\n' }}{%- for tool in tools %}{{ tool | tojson + '\\n' }}{%- endfor %}{{ '<|end|>' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + (call.function or call) | tojson + '</tool_call>' }}{% endfor %}
{{- '<|end|>' }}{% endgeneration %}
{%- elif message.role not in ['system', 'user', 'tool'] %}{{ raise_exception('unknown role ' ~ message.role) }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|' + message.role + '|>' + (message.content or '') + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


# For base models, whose folders name no template: a transcript is what they have most likely read before.
PLAIN_CHAT_TEMPLATE = """\
{{ bos_token }}{%- for message in messages %}
{{- message.role | capitalize + ': ' + (message.content or '') + '\\n\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


class Message(TypedDict):
    """One message of a conversation; ``role`` is system, user, assistant or tool.

    The arguments of a call may be an object or, as OpenAI has it, the text of one: templates get the object.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids of a conversation and, for each, whether the model is trained to produce it."""

    ids: list[int]
    trained: list[bool]


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``: brackets what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Callable[[], str]) -> str:
        return f"{_GENERATION_OPEN}{caller()}{_GENERATION_CLOSE}"


class ChatTemplate:
    """Renders conversations with ``source`` and encodes them with ``tokenizer``."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source = source
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"The model's chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as the text that is encoded. Raises :class:`GaleError` where the template refuses it."""
        return self._restore(_strip_marks(self._render(messages, tools, add_generation_prompt)))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> EncodedChat:
        """Token ids with the loss mask.

        What stands inside the generation marks is encoded apart from what stands before it, because that is
        how an answer comes about at inference: first the prompt's tokens, then tokens of the model's own.
        """
        ids: list[int] = []
        trained: list[bool] = []
        text = self._render(messages, tools, add_generation_prompt)
        for position, part in enumerate(re.split(f"[{_GENERATION_OPEN}{_GENERATION_CLOSE}]", text)):
            part_ids = self._encode_part(part)
            ids += part_ids
            trained += [position % 2 == 1] * len(part_ids)
        return EncodedChat(ids, trained)

    def prompt(self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Token ids after which the model writes the assistant's next message."""
        return self.encode(messages, tools=tools, add_generation_prompt=True).ids

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, add_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[self._disguise(_with_arguments(message)) for message in messages],
                tools=self._disguise(list(tools)) if tools else None,
                add_generation_prompt=add_prompt,
                bos_token=self._tokenizer.bos_token or "",
                eos_token=self._tokenizer.eos_token or "",
            )
        except _TemplateRefusalError as refusal:
            raise GaleError(f"The model's chat template refuses this conversation: {refusal}") from refusal
        except Exception as error:  # a template is a program of the model's, which may fail in any way
            raise GaleError(f"The model's chat template failed on this conversation: {error}") from error

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        # Longest first, so that one token which begins another cannot shadow it.
        tokens = sorted(self._tokenizer.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    @cached_property
    def _control_index(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self._tokenizer.control_tokens)}

    def _disguise(self, value: Any) -> Any:
        """Replace control tokens inside people's text by marks that no template or tokenizer knows."""
        if isinstance(value, str):
            cleaned = _RESERVED.sub("\ufffd", value)
            return self._control_pattern.sub(lambda found: f"{_CONTROL}{self._control_index[found[0]]};", cleaned)
        if isinstance(value, dict):
            return {self._disguise(key): self._disguise(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._disguise(item) for item in value]
        return value

    def _restore(self, text: str) -> str:
        return _DISGUISED.sub(lambda found: self._tokenizer.control_tokens[int(found[1])], text)

    def _encode_part(self, text: str) -> list[int]:
        if _CONTROL not in text:
            return self._tokenizer.encode(text, control_tokens=True)
        ids: list[int] = []
        position = 0
        for found in self._control_pattern.finditer(text):
            ids += self._tokenizer.encode(self._restore(text[position : found.start()]))
            ids += self._tokenizer.encode(found[0], control_tokens=True)
            position = found.end()
        return ids + self._tokenizer.encode(self._restore(text[position:]))


class _TemplateRefusalError(Exception):
    """Raised from inside a template by its own ``raise_exception``."""


def _with_arguments(message: Message) -> dict[str, Any]:
    """The message with the arguments of its calls as objects, since templates would write a text in quotes."""
    calls = [_with_object(call) for call in message.get("tool_calls") or []]
    return {**message, **({"tool_calls": calls} if calls else {})}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _raise_exception(message: str) -> None:
    raise _TemplateRefusalError(message)


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would change the text that the model reads.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _strip_marks(text: str) -> str:
    return text.replace(_GENERATION_OPEN, "").replace(_GENERATION_CLOSE, "")
