"""Calls of tools as a grammar, in the syntax of the model's family."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gale.engine.grammar import json_schema_lark
from gale.engine.request import Grammar, GrammarError, Tools
from gale.text.call_syntax import CallSyntax
from gale.text.tokenizer import Tokenizer

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    syntax: CallSyntax, tokenizer: Tokenizer, tools: Tools, answer: Grammar | None = None
) -> Grammar | None:
    """What an answer with ``tools`` must look like; None where the model is free.

    What is no call must keep to ``answer``, a JSON Schema, where one is given. Raises :class:`GrammarError` where all
    of this cannot be had at once.
    """
    functions = tools.callable
    strict = any(function.get("strict") for function in functions)
    if not tools.required and not strict and tools.parallel and answer is None:
        return None
    if not functions:
        raise GrammarError("There is no function to call.")

    def marker(text: str) -> str:
        token = tokenizer.token_id(text) if text in tokenizer.control_tokens else None
        return _literal(text) if token is None else f"<[{token}]>"

    rules = [_calls(syntax, functions, marker, parallel=tools.parallel)]
    for place, function in enumerate(functions):
        schema = function.get("parameters") or _NOTHING
        rules.append(f"arguments{place}: " + json_schema_lark(schema, lenient=not function.get("strict")))
    if tools.required:
        rules.append("start: calls")
    elif answer is not None:
        if answer.kind != "json_schema":
            raise GrammarError("Beside tools that may be called or not, an answer can only follow a JSON Schema.")
        assert isinstance(answer.value, str), "a schema is one text"
        rules += ["start: calls | answer", "answer: " + json_schema_lark(json.loads(answer.value))]
    elif syntax.bare:
        rules += [f"start: {marker(syntax.opening)}? calls | FREE", r"FREE: /([^{\s](?s:.*))?/"]
    elif marker(syntax.opening).startswith("<"):
        rules += ["start: FREE calls?", "FREE: /(?s:.*)/"]
    else:
        raise GrammarError(
            f"This model's vocabulary has no token for {syntax.opening}, so its calls can be held to their schemas, or "
            "to a single one, only where a call is required."
        )
    return Grammar("lark", "\n".join(reversed(rules)))


def _calls(syntax: CallSyntax, functions: list[dict[str, Any]], marker: Callable[[str], str], *, parallel: bool) -> str:
    """The rules ``calls`` and ``call``, which leave ``arguments0`` and so on to be defined."""
    opening, gap = marker(syntax.opening), _literal(syntax.gap) if syntax.gap else ""
    calls = []
    for place, function in enumerate(functions):
        if syntax.named:
            calls.append(f"{_literal(function['name'])} {marker(syntax.named)} arguments{place}")
        else:
            head = f'{{"name": {json.dumps(function["name"])}, "{syntax.arguments}": '
            calls.append(f'{_literal(head)} arguments{place} "}}"')
    call = "call: " + " | ".join(calls)
    if syntax.listed:
        more = '("," " "? call)*' if parallel else ""
        return f'calls: {opening} " "? "[" call {more} "]"\n{call}'
    if syntax.bare:  # its family calls one function at a time
        return f"calls: call\n{call}"
    closing = marker(syntax.closing) if syntax.closing else ""
    one = f"{opening} {gap} call {gap} {closing}"
    return f"calls: {one} {f'({gap} {one})*' if parallel else ''}\n{call}"


def _literal(text: str) -> str:
    return json.dumps(text)
