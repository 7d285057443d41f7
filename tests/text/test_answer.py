"""An answer is taken apart into what is said, thought and called, however its text arrives, in each family's syntax."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from gale.text.answer import AnswerReader
from gale.text.call_syntax import CallSyntax, call_syntax
from gale.text.template import GALE_CHAT_TEMPLATE, ChatTemplate, Message
from gale.text.tokenizer import Tokenizer

OURS = call_syntax(GALE_CHAT_TEMPLATE)
QWEN = call_syntax("{{ '<tool_call>\\n' }}")
LLAMA = call_syntax("{{ '<|python_tag|>' }}")
MISTRAL = call_syntax("{{ '[TOOL_CALLS] [' }}")
MISTRAL_NAMED = call_syntax("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}")
ARGUMENTS = '{"city": "北京 \\"}{", "deep": {"a": [1, {}]}}'
FIRST = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
SECOND = '{"name": "sum", "arguments": {}}'
FAMILIES: dict[str, tuple[CallSyntax | None, str]] = {
    "ours": (OURS, f"<tool_call>{FIRST}</tool_call><tool_call>{SECOND}</tool_call>"),
    "qwen": (QWEN, f"<tool_call>\n{FIRST}\n</tool_call>\n<tool_call>\n{SECOND}\n</tool_call>"),
    "other order": (
        QWEN,
        f'<tool_call>{{"arguments": {ARGUMENTS},"name":"weather"}}</tool_call><tool_call>{{"name":"sum"}}</tool_call>',
    ),
    "llama": (LLAMA, f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {SECOND}'),
    "llama, tag": (
        LLAMA,
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {ARGUMENTS}}};{SECOND}',
    ),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "123456789"}}, {SECOND}]',
    ),
    "mistral, named": (MISTRAL_NAMED, f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]sum[CALL_ID]abc123[ARGS]{{}}"),
}


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A model whose vocabulary has no token for any marker."""
    return Tokenizer(Backend.from_str(json.dumps(json.loads(tokenizer.to_json()) | {"added_tokens": []})), {})


def read(reader: AnswerReader, parts: list[str]) -> dict[str, Any]:
    """All that an answer in ``parts`` holds."""
    found: dict[str, Any] = {"text": "", "reasoning": "", "calls": []}
    for piece in [piece for part in parts for piece in reader.push(part)] + reader.end():
        if piece.kind == "name":
            assert piece.call == len(found["calls"])
            found["calls"].append([piece.text, ""])
        elif piece.kind == "arguments":
            assert piece.call == len(found["calls"]) - 1
            found["calls"][piece.call][1] += piece.text
        else:
            found[piece.kind] += piece.text
    return found


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[low:high] for low, high in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 10_000)))
def test_calls_are_read_however_the_text_arrives(plain: Tokenizer, family: str, cuts: list[int]) -> None:
    syntax, text = FAMILIES[family]
    reader = AnswerReader(plain, syntax, functions={"weather", "sum"}, thinks=True)
    thought = "<think>\nHm, <tool_call>?\n</think>\n\n"
    found = read(reader, pieces_of(thought + text, cuts))
    assert found["reasoning"] == "Hm, <tool_call>?"
    assert found["text"] == ""
    (first, arguments), (second, nothing) = found["calls"]
    assert (first, second) == ("weather", "sum")
    assert json.loads(arguments) == json.loads(ARGUMENTS)
    assert json.loads(nothing) == {}


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, 10_000)))
def test_text_beside_calls_is_kept_and_no_half_marker_shows(plain: Tokenizer, cuts: list[int]) -> None:
    text = f"Let me <tool look.\n\n<tool_call>\n{SECOND}\n</tool_call>\nDone. <tool_c"
    reader = AnswerReader(plain, QWEN)
    shown = ""
    for part in pieces_of(text, cuts):
        for piece in reader.push(part):
            shown += piece.text if piece.kind == "text" else ""
            assert shown == shown.rstrip("<")
    assert read(AnswerReader(plain, QWEN), pieces_of(text, cuts)) == {
        "text": "Let me <tool look.Done. <tool_c",
        "reasoning": "",
        "calls": [["sum", "{}"]],
    }


def test_a_marker_that_is_a_token_counts_only_as_that_token(tokenizer: Tokenizer) -> None:
    said = f"<tool_call>{SECOND}</tool_call>"
    for control in (False, True):
        reader = AnswerReader(tokenizer, OURS)
        stream = tokenizer.stream(reader.shown)
        found = read(reader, [stream.push(token) for token in tokenizer.encode(said, control_tokens=control)])
        assert found["calls"] == ([["sum", "{}"]] if control else [])
        assert found["text"] == ("" if control else said)


def test_no_text_can_pass_for_a_token(tokenizer: Tokenizer) -> None:
    reader = AnswerReader(tokenizer, OURS)
    stand_in = reader.shown[tokenizer.encode("<tool_call>", control_tokens=True)[0]]
    stream = tokenizer.stream(reader.shown)
    found = read(reader, [stream.push(token) for token in tokenizer.encode(stand_in + SECOND)])
    assert found == {"text": "\ufffd" + SECOND, "reasoning": "", "calls": []}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>print(1)</tool_call>",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"nam": "x"}</tool_call> and so on',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "sum", "argum',
        "<tool_call>",
        " leading white space, and trailing  \n",
    ],
)
def test_what_turns_out_to_be_no_call_is_text(plain: Tokenizer, text: str) -> None:
    for parts in ([text], list(text)):
        assert read(AnswerReader(plain, QWEN), parts) == {"text": text, "reasoning": "", "calls": []}


def test_a_bare_object_is_a_call_only_of_a_known_function(tokenizer: Tokenizer) -> None:
    said = '{"name": "Ada", "parameters": {"born": 1815}}'
    assert read(AnswerReader(tokenizer, LLAMA, functions={"sum"}), list(said))["text"] == said
    assert read(AnswerReader(tokenizer, LLAMA, functions={"Ada"}), list(said))["calls"] == [["Ada", '{"born": 1815}']]


def test_arguments_of_an_answer_cut_short_are_the_beginning(tokenizer: Tokenizer) -> None:
    said = '{"name": "sum", "parameters": {"a": [1, '
    assert read(AnswerReader(tokenizer, LLAMA, functions={"sum"}), list(said))["calls"] == [["sum", '{"a": [1, ']]


@pytest.mark.parametrize(
    ("begun", "text", "reasoning", "rest"),
    [
        (False, "<think>\nwhy\n</think>\n\nso", "why", "so"),
        (True, "why\n</think>\n\nso", "why", "so"),
        (True, "never done ", "never done", ""),
        (False, "  just so", "", "  just so"),
        (False, "I <think> so</think>", "", "I <think> so</think>"),
        (False, "<think></think>so", "", "so"),
        (False, "<thin", "", "<thin"),
    ],
)
@pytest.mark.parametrize("tokens", [False, True])
def test_thoughts_are_parted_from_the_answer(
    tokenizer: Tokenizer, plain: Tokenizer, begun: bool, text: str, reasoning: str, rest: str, tokens: bool
) -> None:
    model = tokenizer if tokens else plain
    reader = AnswerReader(model, None, thinks=True, begun=begun)
    stream = model.stream(reader.shown)
    parts = [stream.push(token) for token in model.encode(text, control_tokens=tokens)]
    assert read(reader, parts) == {"text": rest, "reasoning": reasoning, "calls": []}


def test_families_are_known_by_their_templates() -> None:
    assert CallSyntax("<tool_call>", "</tool_call>") == OURS
    assert CallSyntax("<tool_call>", "</tool_call>", gap="\n") == QWEN
    assert call_syntax("{{ messages }}") is None
    assert call_syntax("<tool_call>\n<function=name>") is None  # calls in XML are not read


def test_calls_and_their_answers_are_rendered_as_the_model_writes_them(tokenizer: Tokenizer) -> None:
    """OpenAI gives arguments as text; a template that gets the text would write it as a string in quotes."""
    template = ChatTemplate(GALE_CHAT_TEMPLATE, tokenizer)
    call = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": "加"}'}}
    messages = [
        Message(role="user", content="x"),
        Message(role="assistant", content="", tool_calls=[call]),
        Message(role="tool", content="3", tool_call_id="c1", name="sum"),
    ]
    said = '<tool_call>{"name": "sum", "arguments": {"a": "加"}}</tool_call>'
    assert template.render(messages) == f"<|user|>x<|end|><|assistant|>{said}<|end|><|tool|>3<|end|>"
    reader = AnswerReader(tokenizer, OURS)
    stream = tokenizer.stream(reader.shown)
    chat = template.encode(messages)
    trained = [token for token, flag in zip(chat.ids, chat.trained, strict=True) if flag]
    assert read(reader, [stream.push(token) for token in trained])["calls"] == [["sum", '{"a": "加"}']]
