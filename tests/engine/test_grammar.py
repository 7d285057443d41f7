"""An answer is held to its grammar from its first token to its last, whatever the model would rather say; what cannot
be a grammar is refused before any token, and no grammar disturbs anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gale.engine.grammar import _CHUNK, Grammars, Matcher, Thinking
from gale.engine.local import LocalEngine
from gale.engine.request import Grammar, GrammarError
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import answer

MakeEngine = Callable[..., LocalEngine]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "风", 'q"']}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.fixture
def end(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset({tokenizer.encode("<|end|>", control_tokens=True)[0]})


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    end = tokenizer.encode("<|end|>", control_tokens=True)
    return Grammars(tokenizer, vocabulary_size=tokenizer.vocabulary_size, end_tokens=frozenset(end))


def say_anything(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar, seed: int, most: int = 400) -> str:
    """What a model without any preference says."""
    matcher = grammars.compile(grammar)
    rng = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < most and not matcher.complete:
        token = rng.choice(allowed(matcher, tokenizer))
        matcher.commit(token)
        if tokenizer.token_bytes(token) == b"":
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def allowed(matcher: Matcher, tokenizer: Tokenizer) -> list[int]:
    scores = torch.zeros(tokenizer.vocabulary_size)
    matcher.mask(scores)
    return list(scores.isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("sampling", [{"temperature": 0}, *({"seed": seed} for seed in range(6))])
def test_every_answer_of_a_random_model_fits_its_json_schema(
    make_engine: MakeEngine, end: frozenset[int], sampling: dict[str, Any]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    text, finished = asyncio.run(answer(make_engine(end_tokens=end), "Who?", grammar=schema(PERSON), **sampling))
    assert finished.reason == "stop"
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"^[a-f]{3}-\d+/?$"), r"[a-f]{3}-\d+/?"),
        (Grammar("regex", "(风|山){2,5}"), "(风|山){2,5}"),
        (Grammar("choice", ("yes", "no", 'per"haps\n', "是的", "\x7f/\\")), 'yes|no|per"haps\\n|是的|\x7f/\\\\'),
        (Grammar("lark", 'start: "<" INNER ">"\nINNER: /[xy]{1,4}/'), "<[xy]{1,4}>"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_fits_its_pattern(make_engine: MakeEngine, grammar: Grammar, pattern: str, seed: int) -> None:
    """Also where the model has no end token: an answer that can only be complete ends of itself."""
    text, finished = asyncio.run(answer(make_engine(), "Say", grammar=grammar, seed=seed, max_tokens=60))
    if finished.reason == "length":  # \d+ may go on
        assert pattern.endswith(r"\d+/?")
    else:
        assert re.fullmatch(pattern, text)


def test_an_answer_ends_only_where_its_grammar_allows(grammars: Grammars, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|end|>")
    matcher = grammars.compile(Grammar("regex", "a{2,3}"))
    letter = tokenizer.token_id("a")
    assert letter is not None
    for ends in (False, False, True):
        assert (end in allowed(matcher, tokenizer)) == ends
        assert not matcher.complete
        matcher.commit(letter)
    assert matcher.complete


def test_what_spells_a_control_token_is_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = Grammar("choice", ("a<|end|>b", "c</tool_call>"))
    said = {say_anything(grammars, tokenizer, grammar, seed) for seed in range(8)}
    assert said == set(grammar.value)


def test_control_tokens_are_no_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.compile(Grammar("regex", "(?s:.*)"))
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    assert control.intersection(allowed(matcher, tokenizer)) == {tokenizer.token_id("<|end|>")}


def test_white_space_cannot_go_on_for_ever(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.compile(schema({"type": "object"}))
    space = tokenizer.token_id("Ġ")
    assert space is not None
    matcher.commit(tokenizer.encode("{")[0])
    for _ in range(24):
        matcher.commit(space)
    assert space not in allowed(matcher, tokenizer)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[" * 60_000),
        Grammar("json_schema", "[]"),
        schema({"type": "wizard"}),
        schema({"$ref": "#"}),
        schema({"$ref": "http://169.254.169.254/latest"}),
        schema({"type": "string", "format": "made-up"}),
        schema({"type": "integer", "multipleOf": 1_000_003}),
        schema({"enum": ["x" * 70_000]}),
        schema({"type": "integer", "minimum": 5, "maximum": 4}),
        Grammar("regex", "(?<=a)b"),
        Grammar("regex", r"(a)\1"),
        Grammar("regex", "(" * 30_000 + "a" + ")" * 30_000),
        Grammar("lark", ""),
        Grammar("lark", "start: missing"),
        Grammar("lark", 'start: "a'),
        Grammar("lark", "start: A\nA: A"),
        Grammar("lark", 'start: %json {"type": "integer", "multiple\\u004ff": 1000003}'),
        Grammar("lark", "start: " + "(" * 9_000 + '"a"' + ")" * 9_000),
        Grammar("lark", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(4000)) + 'a4000: "x"'),
        Grammar("lark", "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(40)) + 'a40: "x"'),
        Grammar("choice", ()),
        Grammar("regex", "\ud800"),
        Grammar("spans", ("short",), least=6),
        Grammar("spans", ()),
    ],
    ids=lambda grammar: f"{grammar.kind} {str(grammar.value)[:24]}",
)
def test_what_is_no_grammar_is_refused_before_any_token(make_engine: MakeEngine, grammar: Grammar) -> None:
    with pytest.raises(GrammarError):
        asyncio.run(answer(make_engine(), "Say", grammar=grammar, max_tokens=5))


HOSTILE = [
    Grammar("regex", "(a+)+$"),
    Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    Grammar("regex", "(.*a.{500}){20}"),
    Grammar("lark", "start: T\nT: " + " & ".join(f"/(?s:.*)[a-z]{{{i}}}.*(?s:.*)/" for i in range(1, 12))),
    Grammar("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1} A{i + 1}\n" for i in range(30)) + 'A30: "x"'),
    Grammar("lark", "start: s\ns: s s s s | s s | /./ | "),
    Grammar("lark", "start: s*\ns: s? t? s? t? s?\nt: s t | /[a-z]/"),
    schema({"type": "string", "maxLength": 10**9}),
    schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    schema({"allOf": [{"type": "string", "pattern": f"^(.*[a-z]{{{j + 3}}}.*){{3}}$"} for j in range(8)]}),
    Grammar("choice", tuple(f"option number {i}" for i in range(3000))),
    Grammar("spans", ("ab" * 30_000,), least=20),
]


@pytest.mark.parametrize("grammar", HOSTILE, ids=lambda grammar: f"{grammar.kind} {str(grammar.value)[:24]}")
def test_no_grammar_takes_long(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar) -> None:
    began = time.process_time()
    with contextlib.suppress(GrammarError):
        say_anything(grammars, tokenizer, grammar, seed=3, most=30)
    assert time.process_time() - began < 3  # CPU time; without limits some of them took tens of seconds


def test_thousands_of_grammars_leave_nothing_behind(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Nothing is kept for a next time, so nobody can fill the memory with grammars of which no two are alike."""

    def use(numbers: range) -> None:
        for number in numbers:
            names = {f"property_{number}_{i}": {"type": "string", "maxLength": number} for i in range(8)}
            matcher = grammars.compile(schema({"type": "object", "properties": names, "required": sorted(names)}))
            matcher.commit(tokenizer.encode("{")[0])

    use(range(100, 600))
    process = psutil.Process()
    before = process.memory_info().rss
    use(range(600, 2600))
    assert process.memory_info().rss - before < 24 * 2**20  # kept, they took some 100 KB each


def test_free_and_constrained_answers_in_one_batch_are_what_they_are_alone(
    make_engine: MakeEngine, end: frozenset[int]
) -> None:
    engine = make_engine(end_tokens=end)
    grammars: list[Grammar | None] = [
        None,
        schema(PERSON),
        None,
        Grammar("choice", ("left", "right")),
        schema({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}),  # too many ways to go on from "{"
        None,
    ]

    async def one(place: int) -> Any:
        try:
            return await answer(engine, f"Question {place}", grammar=grammars[place], seed=place, max_tokens=60)
        except GrammarError as error:
            return error.message

    async def together() -> list[Any]:
        return list(await asyncio.gather(*map(one, range(len(grammars)))))

    async def one_by_one() -> list[Any]:
        return [await one(place) for place in range(len(grammars))]

    answers = asyncio.run(together())
    assert answers == asyncio.run(one_by_one())
    assert "answer" in answers[4] and "grammar" in answers[4]
    assert answers[3][0] in ("left", "right")


def test_a_model_thinks_freely_and_then_keeps_to_the_grammar(grammars: Grammars, tokenizer: Tokenizer) -> None:
    opens, closes, end = (tokenizer.encode(name, control_tokens=True)[0] for name in ("<think>", "</think>", "<|end|>"))
    letter = tokenizer.encode("x")[0]
    grammar = Grammar("choice", ("x",))
    for begun in (False, True):
        matcher = grammars.compile(grammar, Thinking(opens, closes, begun))
        if not begun:
            assert set(allowed(matcher, tokenizer)) == {opens, letter}
            matcher.commit(opens)
        for _ in range(2):
            assert set(range(tokenizer.vocabulary_size)) - set(allowed(matcher, tokenizer)) == {end}
            matcher.commit(letter)
        matcher.commit(closes)
        assert allowed(matcher, tokenizer) == [letter]
        matcher.commit(letter)
        assert matcher.complete
    matcher = grammars.compile(grammar, Thinking(opens, closes, False))
    matcher.commit(letter)
    assert matcher.complete


passages = st.lists(
    st.text(st.sampled_from('ab cd.\n"\\{}/é风山 去，哪里🎉\x7f'), min_size=1, max_size=60), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(passages, st.integers(0, 12), st.integers(0, 2**32))
def test_a_span_is_verbatim_whatever_the_model_says(
    grammars: Grammars, tokenizer: Tokenizer, passages: list[str], least: int, seed: int
) -> None:
    grammar = Grammar("spans", tuple(passages), least=least)
    if max(map(len, passages)) < max(least, 1):
        with pytest.raises(GrammarError):
            grammars.compile(grammar)
        return
    said = say_anything(grammars, tokenizer, grammar, seed)
    assert len(said) >= max(least, 1)
    words = [_CHUNK.findall(passage) for passage in passages]
    spans = (
        "".join(chunks[low:high])
        for chunks in words
        for low in range(len(chunks))
        for high in range(low, len(chunks) + 1)
    )
    assert said in spans


def test_spans_are_made_of_whole_words_or_of_characters_where_words_are_not_parted() -> None:
    assert _CHUNK.findall("The river, 河流去 naïve_1 กข") == [
        *("The", " ", "river", ",", " ", "河", "流", "去", " ", "naïve_1", " ", "ก", "ข")
    ]


def test_every_span_of_a_passage_can_be_said(grammars: Grammars, tokenizer: Tokenizer) -> None:
    passage = '风从山上吹来。 "It goes\nto the sea," 他说。'
    chunks = _CHUNK.findall(passage)
    for low in range(len(chunks)):
        for high in range(low + 1, len(chunks) + 1):
            matcher = grammars.compile(Grammar("spans", ("something else", passage)))
            for token in tokenizer.encode("".join(chunks[low:high])):
                assert token in allowed(matcher, tokenizer)
                matcher.commit(token)
