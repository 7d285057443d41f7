"""What is asked of a llama.cpp server: once by the recorder, and in the tests of what the recording answers.

The cases of :data:`ENGINE` ask through Gale's upstream engine, those of :data:`SERVED` with OpenAI's client through
``gale serve --upstream``. The model is Gale's built-in one, whose own answers the tests compare.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai

from gale.engine.request import Grammar, SamplingParams, Tools
from gale.engine.upstream import UpstreamEngine
from gale.text.template import Message
from tests.server.upstreams import all_of, user

QUESTION = "Hello! What is rain?"
PROMPT = [711, 3362, 232]  # "The wind "
TEXT = "The wind 风从山上吹来 🎉 <|end|>"
GREEDY = SamplingParams(max_tokens=12, temperature=0)
# A model as small as this one calls no tool by itself, and would fill the room that a grammar leaves with spaces: the
# end and the marks of a call are made likelier than all else that the grammar allows, spaces and commas less likely.
END, TOOL_CALL, TOOL_CALL_END = 1, 6, 7
SPACES_AND_COMMAS = (209, 210, 232, 373, 383, 762, 1033, 1413, 3399, 23, 3116)
NO_SPACES = ((END, 100.0), *((token, -100.0) for token in SPACES_AND_COMMAS))
EAGER = (*NO_SPACES, (TOOL_CALL, 90.0), (TOOL_CALL_END, 80.0))
TOO_EAGER = (*NO_SPACES[1:], (TOOL_CALL, 100.0), (TOOL_CALL_END, 100.0))
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": ["river", "风"]}},
    "required": ["word"],
    "additionalProperties": False,
}
FUNCTIONS = tuple({"name": name, "description": "Looks up.", "parameters": SCHEMA} for name in ("look", "find"))
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"word": "river"}'}}
ANSWERED: list[Message] = [
    *user("Look up the river."),
    Message(role="assistant", content="", tool_calls=[CALL]),
    Message(role="tool", content="42", tool_call_id="c1", name="look"),
]
CALLING = SamplingParams(max_tokens=40, temperature=0, logit_bias=EAGER)

EngineCase = Callable[[UpstreamEngine], Awaitable[Any]]
ServedCase = Callable[[openai.OpenAI], Any]


async def connect(engine: UpstreamEngine) -> Any:
    return engine.model_id, engine.context_length, engine.adapters


async def tokens(engine: UpstreamEngine) -> Any:
    return (
        await asyncio.to_thread(engine.encode, TEXT),
        await asyncio.to_thread(engine.encode_chat, user("The wind 🎉")),
        await asyncio.to_thread(engine.count_prompt_tokens, user("The wind"), Tools(FUNCTIONS)),
        [await asyncio.to_thread(engine.token_bytes, token) for token in (1000, 300, 5)],
    )


def chat(
    sampling: SamplingParams = GREEDY, tools: Tools | None = None, messages: list[Message] | None = None
) -> EngineCase:
    return lambda engine: all_of(engine.chat(messages or user(QUESTION), sampling, tools))


def complete(prompt: list[int] | None = None, **options: Any) -> EngineCase:
    sampling = SamplingParams(**{"max_tokens": 4, "temperature": 0, **options})
    return lambda engine: all_of(engine.complete(prompt or PROMPT, sampling))


def held(grammar: Grammar) -> SamplingParams:
    return SamplingParams(max_tokens=40, temperature=0, grammar=grammar, logit_bias=NO_SPACES)


OBJECT = Grammar("json_schema", '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}')
WORD = Grammar("json_schema", '{"enum": ["rain", "snow"]}')
EVERYTHING = SamplingParams(
    max_tokens=4,
    temperature=0.9,
    top_p=0.8,
    top_k=5,
    min_p=0.01,
    seed=5,
    repetition_penalty=1.2,
    frequency_penalty=0.5,
    presence_penalty=0.5,
    logit_bias=((20, 3.0),),
)

ENGINE: dict[str, EngineCase] = {
    "connect": connect,
    "tokens": tokens,
    "chat": chat(),
    "sampled": chat(EVERYTHING),
    "no limit": chat(SamplingParams(max_tokens=10**9, temperature=0), messages=user("Hi")),
    "stop": chat(SamplingParams(max_tokens=12, temperature=0, stop=(" you",))),
    "chat scores": chat(SamplingParams(max_tokens=3, temperature=0, logprobs=2)),
    "completion": complete(),
    "scores": complete(logprobs=2),
    "scores without others": complete(logprobs=0),
    "prompt scores": complete(logprobs=1, prompt_logprobs=True),
    "object": chat(held(OBJECT)),
    "completed word": complete(max_tokens=12, grammar=WORD),
    "choice": chat(held(Grammar("choice", ("yes", 'no "风"')))),
    "tools": chat(GREEDY, Tools(FUNCTIONS)),
    "one tool, required": chat(CALLING, Tools(FUNCTIONS[:1], required=True, parallel=False)),
    "tools, required": chat(CALLING, Tools(FUNCTIONS, required=True, parallel=False)),
    # "parallel_tool_calls": false does not keep the model from another one.
    "second call": chat(
        SamplingParams(max_tokens=80, temperature=0, logit_bias=TOO_EAGER),
        Tools(FUNCTIONS[:1], required=True, parallel=False),
    ),
    "answered call": chat(GREEDY, messages=ANSWERED),
    "too long": chat(messages=user("wind " * 600)),
    "no such token": complete([10**6]),
    "no schema": chat(held(Grammar("json_schema", '{"type": "nonsense"}'))),
}
# By servers of their own: one that wants a key, and one that has just been started again.
WRONG_KEY, RESTARTED = "wrong key", "restarted"
# All of SERVED, by one ``gale serve``.
GALE_SERVE = "gale serve"

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


def _stream(client: openai.OpenAI) -> Any:
    return list(
        client.chat.completions.create(
            model="gale-0",
            messages=MESSAGES,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )


def _call(client: openai.OpenAI) -> Any:
    tools: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
    return client.chat.completions.create(
        model="gale-0",
        messages=MESSAGES,
        temperature=0,
        max_tokens=40,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "find"}},
        parallel_tool_calls=False,
        logit_bias={str(token): int(bias) for token, bias in EAGER},
    )


def ask_all(client: openai.OpenAI) -> dict[str, Any]:
    """What each of :data:`SERVED` answers, or its refusal."""

    def ask(case: ServedCase) -> Any:
        try:
            return case(client)
        except openai.APIStatusError as error:
            return error

    return {name: ask(case) for name, case in SERVED.items()}


SERVED: dict[str, ServedCase] = {
    "models": lambda client: client.models.list(),
    "chat": lambda client: client.chat.completions.create(
        model="gale-0", messages=MESSAGES, max_tokens=6, temperature=0, stop=" know", logprobs=True, top_logprobs=1
    ),
    "stream": _stream,
    "completion": lambda client: client.completions.create(
        model="gale-0", prompt="The wind ", max_tokens=3, temperature=0, logprobs=1
    ),
    "call": _call,
    "too long": lambda client: client.chat.completions.create(
        model="gale-0", messages=[{"role": "user", "content": "wind " * 600}], max_tokens=6
    ),
    "unknown model": lambda client: client.chat.completions.create(model="nobody", messages=MESSAGES),
    "embeddings": lambda client: client.embeddings.create(model="gale-0", input="rain"),
}
