"""A model calls tools in its own family's syntax: forced calls keep to their schemas, whatever the model would say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer as Backend

from gale.engine.local import LocalEngine
from gale.engine.request import (
    Event,
    Finished,
    Grammar,
    GrammarError,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    ToolCallDelta,
    Tools,
)
from gale.text.template import GALE_CHAT_TEMPLATE
from gale.text.tokenizer import Tokenizer
from tests.engine.conftest import user
from tests.tiny_model import make_model

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "天气",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Oslo", "北京", 'a"b</tool_call>']}},
    },
}
NOW: dict[str, Any] = {"name": "now"}
NOTHING: dict[str, Any] = {"type": "object", "additionalProperties": False}

# Each says what a family's template is known by, in few words of our own.
HEAD = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ tools | tojson if tools }}"
TEMPLATES = {
    "ours": GALE_CHAT_TEMPLATE,
    "qwen": HEAD + "{{ '<tool_call>\\n' if false }}",
    "llama": HEAD + "{{ '<|python_tag|>' if false }}",
    "mistral": HEAD + "{{ '[TOOL_CALLS]' if false }}",
    "mistral, named": HEAD + "{{ '[TOOL_CALLS][ARGS]' if false }}",
}
TOKENS = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"]


@pytest.fixture(params=["tokens", "spelled out"])
def spelled_out(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "spelled out")


class Families:
    """Engines for templates, made when they are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._json = tokenizer.to_json()
        self._engines: dict[tuple[str, bool], LocalEngine] = {}

    def engine(self, template: str, *, spelled_out: bool = False) -> LocalEngine:
        """An engine over the tiny model; ``spelled_out`` takes the markers out of its vocabulary."""
        if (template, spelled_out) not in self._engines:
            content = json.loads(self._json)
            if spelled_out:
                content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<|end|>"]
            backend = Backend.from_str(json.dumps(content))
            backend.add_special_tokens([] if spelled_out else TOKENS)
            tokenizer = Tokenizer(backend, {"chat_template": template})
            end = frozenset(tokenizer.encode("<|end|>", control_tokens=True))
            self._engines[template, spelled_out] = LocalEngine(
                make_model(tokenizer), tokenizer, model_id="tiny", end_tokens=end
            )
        return self._engines[template, spelled_out]

    def close(self) -> None:
        for engine in self._engines.values():
            asyncio.run(engine.close())


@pytest.fixture(scope="module")
def families(tokenizer: Tokenizer) -> Iterator[Families]:
    made = Families(tokenizer)
    yield made
    made.close()


def ask(engine: LocalEngine, tools: Tools | None = None, **sampling: Any) -> tuple[str, str, list[Any], Finished]:
    """The text, the thoughts and the calls of an answer, and how it ended."""

    async def run() -> list[Event]:
        return [event async for event in engine.chat(user("Hi"), SamplingParams(**sampling), tools)]

    *deltas, last = asyncio.run(run())
    assert isinstance(last, Finished)
    calls: list[Any] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                assert delta.id and delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    return text, "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)), calls, last


def check(calls: list[Any]) -> None:
    for name, arguments in calls:
        schema = {"weather": WEATHER["parameters"], "now": NOTHING}[name]
        jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_keeps_to_its_schema(families: Families, family: str, seed: int, spelled_out: bool) -> None:
    engine = families.engine(TEMPLATES[family], spelled_out=spelled_out)
    tools = Tools((WEATHER, NOW), required=True, parallel=False)
    text, _, calls, finished = ask(engine, tools, seed=seed, max_tokens=300)
    assert finished.reason == "stop"
    assert len(calls) == 1
    assert text == ""
    check(calls)


@pytest.mark.parametrize("family", TEMPLATES)
def test_several_calls_at_once_are_possible(families: Families, family: str) -> None:
    """A random model stops early, so its scores are pushed to what stands between calls."""
    engine = families.engine(TEMPLATES[family])
    between = {"ours": "<tool_call>", "qwen": "\n", "llama": ";", "mistral": ","}.get(family, "[TOOL_CALLS]")
    push = ((engine.encode(between)[0], 60.0),)
    for parallel in (True, False):
        tools = Tools((NOW,), required=True, parallel=parallel)
        calls = ask(engine, tools, seed=1, max_tokens=100, logit_bias=push)[2]
        if parallel and family != "llama":  # whose family calls one function at a time
            assert len(calls) > 1
            check(calls[:-1])
        else:
            assert len(calls) == 1
            check(calls)


def test_only_the_functions_that_are_named_can_be_called(families: Families) -> None:
    engine = families.engine(GALE_CHAT_TEMPLATE)
    tools = Tools((WEATHER, NOW), required=True, only=frozenset({"now"}), parallel=False)
    for seed in range(2):
        [[name, arguments]] = ask(engine, tools, seed=seed, max_tokens=100)[2]
        assert (name, json.loads(arguments)) == ("now", {})


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_strict_function_that_is_called_of_the_models_own_will_keeps_to_its_schema(
    families: Families, family: str
) -> None:
    """A random model seldom calls, so its scores are pushed to where calls begin."""
    engine = families.engine(TEMPLATES[family])
    tools = Tools(({**WEATHER, "strict": True},), parallel=False)
    opening = {"ours": "<tool_call>", "qwen": "<tool_call>", "llama": "{"}.get(family, "[TOOL_CALLS]")
    push = ((engine.encode(opening)[0], 100.0),)
    text, _, calls, finished = ask(engine, tools, seed=1, max_tokens=300, logit_bias=push)
    assert finished.reason == "stop"
    assert len(calls) == 1
    check(calls)
    text, _, calls, _ = ask(engine, tools, seed=1, max_tokens=20)
    assert text and not calls


def test_an_answer_beside_tools_keeps_to_its_schema(families: Families) -> None:
    engine = families.engine(GALE_CHAT_TEMPLATE)
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    grammar = Grammar("json_schema", json.dumps(schema | {"additionalProperties": False}))
    push = (engine.encode("{")[0], engine.encode("<tool_call>")[0])
    for token, calls_expected in zip(push, (0, 1), strict=True):
        bias = ((token, 60.0),)
        tools = Tools((WEATHER,), parallel=False)
        text, _, calls, finished = ask(engine, tools, seed=3, max_tokens=200, grammar=grammar, logit_bias=bias)
        assert (len(calls), finished.reason) == (calls_expected, "stop")
        check(calls)
        if not calls:
            jsonschema.validate(json.loads(text), schema)
    with pytest.raises(GrammarError, match="JSON Schema"):
        ask(engine, Tools((WEATHER,)), grammar=Grammar("regex", "a"))


def test_hostile_schemas_of_functions_are_refused(families: Families) -> None:
    engine = families.engine(GALE_CHAT_TEMPLATE)
    for parameters in ({"type": "wizard"}, {"type": "integer", "multipleOf": 1_000_003}, {"$ref": "#/$defs/missing"}):
        with pytest.raises(GrammarError):
            ask(engine, Tools(({"name": "f", "parameters": parameters},), required=True))


def test_many_functions_fit(families: Families) -> None:
    functions = tuple({**WEATHER, "name": f"weather_{place}"} for place in range(100))
    engine = families.engine("{{ '<tool_call>' if false }}Hi")
    _, _, calls, _ = ask(engine, Tools(functions, required=True, parallel=False), seed=1, max_tokens=300)
    assert calls[0][0].startswith("weather_")
    jsonschema.validate(json.loads(calls[0][1]), WEATHER["parameters"])


def test_a_template_without_tools_refuses_them(families: Families) -> None:
    with pytest.raises(GrammarError, match="no tools"):
        ask(families.engine("{{ messages[0].content }}"), Tools((NOW,)))


@pytest.mark.parametrize("begun", [False, True])
def test_a_model_that_thinks_does_so_before_its_answer_keeps_to_the_grammar(families: Families, begun: bool) -> None:
    template = HEAD + "{{ '</think>' if false }}{{ '<think>\\n' }}" if begun else HEAD + "{{ '</think>' if false }}"
    engine = families.engine(template)
    opens, closes = engine.encode("<think>")[0], engine.encode("</think>")[0]
    grammar = Grammar("choice", ("left", "right"))
    # Its scores are pushed so that it opens a thought where it may, and closes it where it may.
    text, thoughts, _, finished = ask(
        engine, seed=4, max_tokens=50, grammar=grammar, logit_bias=((opens, 50.0), (closes, 90.0))
    )
    assert (thoughts, finished.reason) == ("", "stop")
    assert text in ("left", "right")
    text, thoughts, _, finished = ask(
        engine, seed=4, max_tokens=9, grammar=grammar, logit_bias=((opens, 50.0), (closes, -100.0))
    )
    assert (text, finished.reason) == ("", "length")
    assert thoughts


def test_scores_come_with_every_token_of_thoughts_and_calls_too(families: Families) -> None:
    engine = families.engine(GALE_CHAT_TEMPLATE)

    async def run() -> list[Event]:
        sampling = SamplingParams(seed=2, max_tokens=60, logprobs=1)
        return [
            event async for event in engine.chat(user("Hi"), sampling, Tools((NOW,), required=True, parallel=False))
        ]

    *deltas, last = asyncio.run(run())
    assert isinstance(last, Finished)
    scores = [delta.score for delta in deltas if isinstance(delta, TextDelta) and delta.score]
    assert len(scores) == last.usage.completion_tokens
