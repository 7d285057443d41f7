"""How families of models write tool calls, known by the text of their chat templates."""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK_OPENS, THINK_CLOSES = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """One family's way: ``opening``, then a call as a JSON object with "name" and ``arguments``, then ``closing``.

    ``gap`` stands between these. With ``listed`` the calls stand in a JSON list, with ``separator`` several follow each
    other so. ``bare`` models also begin an answer with the object itself, without ``opening``. Where there is a
    ``named``, the call is the function's name, that marker and the arguments.
    """

    opening: str
    closing: str = ""
    gap: str = ""
    arguments: str = "arguments"
    listed: bool = False
    separator: str = ""
    bare: bool = False
    named: str = ""

    @property
    def markers(self) -> list[str]:
        """Texts that are tokens of their own in most vocabularies."""
        return [marker for marker in (self.opening, self.closing, self.named, self.named and "[CALL_ID]") if marker]


_LLAMA = CallSyntax("<|python_tag|>", arguments="parameters", separator=";", bare=True)
_MISTRAL = CallSyntax("[TOOL_CALLS]", listed=True, separator=",")
_MISTRAL_NAMED = CallSyntax("[TOOL_CALLS]", named="[ARGS]")


def call_syntax(template: str) -> CallSyntax | None:
    """The syntax of a chat template's source; None where it has no tools, or calls that are not JSON."""
    if "<function=" in template or "<arg_key>" in template:
        return None
    if "[TOOL_CALLS]" in template:
        return _MISTRAL_NAMED if "[ARGS]" in template else _MISTRAL
    if "<tool_call>" in template:  # Hermes, Qwen, and ours, which writes no line breaks around the object
        lines = re.search(r"<tool_call>(\n|\\n)", template)
        return CallSyntax("<tool_call>", "</tool_call>", gap="\n" if lines else "")
    return _LLAMA if "<|python_tag|>" in template else None
