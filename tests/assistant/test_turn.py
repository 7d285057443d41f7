"""What the model reads of a long conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from gale.assistant.turn import CHAT_SAMPLING, answer, fit, reserved_tokens
from gale.engine.request import ContextLengthError, Event, Finished, SamplingParams, TextDelta, Usage
from gale.text.template import Message


class WordEngine:
    """Counts words as tokens and answers "a b" for ever until closed."""

    model_id = "words"
    context_length = 40

    def __init__(self) -> None:
        self.counts = 0
        self.closed = False
        self.read: list[Message] = []

    def count_prompt_tokens(self, messages: list[Message]) -> int:
        self.counts += 1
        return sum(len(message["content"].split()) for message in messages)

    async def chat(self, messages: list[Message], sampling: SamplingParams) -> AsyncGenerator[Event, None]:
        self.read = messages
        assert sampling is CHAT_SAMPLING
        try:
            yield TextDelta("a")
            yield TextDelta(" b")
            yield Finished("stop", Usage(1, 2))
        finally:
            self.closed = True

    async def close(self) -> None:
        return


def message(role: str, words: int, tag: str = "w") -> Message:
    return Message(role=role, content=" ".join([tag] * words))


def test_what_fits_is_left_whole() -> None:
    path = [message("system", 2), message("user", 5), message("assistant", 5), message("user", 5)]
    assert fit(WordEngine(), path) == path


def test_oldest_whole_turns_go_first_and_the_system_message_stays() -> None:
    path = [message("system", 2)]
    for number in range(50):
        path += [message("user", 4, f"q{number}"), message("assistant", 4, f"a{number}")]
    path.append(message("user", 4, "last"))
    engine = WordEngine()
    kept = fit(engine, path)
    # 40 tokens less a quarter for the answer: the system message, three turns of 8, and the last question.
    assert [each["content"].split()[0] for each in kept] == ["w", "q47", "a47", "q48", "a48", "q49", "a49", "last"]
    assert engine.counts < 10


def test_the_last_message_may_use_the_reserve_but_not_everything() -> None:
    long = [message("user", 3), message("assistant", 3), message("user", 39)]
    assert fit(WordEngine(), long) == [long[-1]]
    with pytest.raises(ContextLengthError) as caught:
        fit(WordEngine(), [message("user", 40)])
    assert (caught.value.prompt_tokens, caught.value.context_length) == (40, 40)


def test_the_reserve_is_a_quarter_up_to_a_limit() -> None:
    assert (reserved_tokens(40), reserved_tokens(2048), reserved_tokens(131072)) == (10, 512, 512)


def test_roles_alternate_after_stopped_and_unanswered_questions() -> None:
    path = [
        Message(role="user", content="one"),
        Message(role="assistant", content=""),
        Message(role="user", content="two"),
        Message(role="assistant", content="answer"),
        Message(role="user", content="three"),
    ]
    assert fit(WordEngine(), path) == [
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "three"},
    ]


def test_events_pass_through_and_closing_closes_the_engine() -> None:
    async def whole(engine: WordEngine) -> list[Event]:
        return [event async for event in answer(engine, [message("user", 1)])]

    async def half(engine: WordEngine) -> None:
        events = answer(engine, [message("user", 1)])
        await anext(events)
        await events.aclose()

    engine = WordEngine()
    assert asyncio.run(whole(engine)) == [TextDelta("a"), TextDelta(" b"), Finished("stop", Usage(1, 2))]
    assert engine.read == [message("user", 1)]
    engine = WordEngine()
    asyncio.run(half(engine))
    assert engine.closed


def test_what_the_engine_does_not_even_count_is_forgotten_too() -> None:
    class Strict(WordEngine):
        def count_prompt_tokens(self, messages: list[Message]) -> int:
            count = super().count_prompt_tokens(messages)
            if count > 60:
                raise ContextLengthError(count, self.context_length)
            return count

    path = [message(role, 12, str(turn)) for turn in range(30) for role in ("user", "assistant")]
    chosen = fit(Strict(), [*path, message("user", 2, "last")])
    assert chosen[-1]["content"] == "last last"
    assert len(chosen) == 3
