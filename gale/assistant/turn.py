"""How one turn of the chat page is answered: what of the conversation the model reads, and how it samples.

The API never drops a message, because a program must know what the model saw. A person in a long conversation
would rather have it forget the beginning than refuse to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from gale.engine.request import ContextLengthError, Engine, Event, SamplingParams
from gale.text.template import Message

# Livelier than greedy, yet cool and without the tail, since small models ramble; and with an end for one that loops.
CHAT_SAMPLING = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=2048)

# The answer is promised a quarter of the context, but no more than this many tokens.
MOST_RESERVED_TOKENS = 512


def reserved_tokens(context_length: int) -> int:
    """Tokens kept free for the answer when old turns are dropped."""
    return min(MOST_RESERVED_TOKENS, context_length // 4)


async def answer(
    engine: Engine, path: Sequence[Message], sampling: SamplingParams = CHAT_SAMPLING
) -> AsyncGenerator[Event, None]:
    """Answer the last message of ``path``, forgetting the oldest turns where all of it does not fit.

    Yields the engine's events. Raises :class:`ContextLengthError` before the first one if the last turn alone does
    not fit, and whatever the engine raises. Closing the generator stops the engine.
    """
    messages = await asyncio.to_thread(fit, engine, path)
    events = engine.chat(messages, sampling)
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()


def fit(engine: Engine, path: Sequence[Message]) -> list[Message]:
    """The most recent whole turns of ``path`` that leave the reserve free, after its system messages.

    The last turn is kept even where it leaves less than the reserve. Raises :class:`ContextLengthError` if it
    does not leave room for one token.
    """
    system = [message for message in path if message["role"] == "system"]
    turns = _turns([message for message in path if message["role"] != "system"])
    budget = engine.context_length - reserved_tokens(engine.context_length)

    def prompt(dropped: int) -> list[Message]:
        return system + [message for turn in turns[dropped:] for message in turn]

    def fits(dropped: int) -> bool:
        try:
            return engine.count_prompt_tokens(prompt(dropped)) <= budget
        except ContextLengthError:  # so long that the engine does not even count it
            return False

    # Bisection, because counting means encoding the whole text: a conversation of a thousand turns costs ten counts.
    low, high = 0, max(len(turns) - 1, 0)
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    chosen = prompt(low)
    tokens = engine.count_prompt_tokens(chosen)
    if tokens >= engine.context_length:
        raise ContextLengthError(tokens, engine.context_length)
    return chosen


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Each question with what answered it.

    An answer that was stopped before its first word says nothing and is left out. Questions that went unanswered
    are joined with the next one, since many templates insist that roles alternate.
    """
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "assistant" and not message["content"]:
            continue
        if message["role"] != "user" and turns:
            turns[-1].append(message)
        elif turns and turns[-1][-1]["role"] == "user":
            earlier = turns[-1][-1]
            turns[-1][-1] = Message(role="user", content=f"{earlier['content']}\n\n{message['content']}")
        else:
            turns.append([message])
    return turns
