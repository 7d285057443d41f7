"""``gale chat``: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import sys
import unicodedata
from typing import TYPE_CHECKING, Annotated

import typer

from gale.core.errors import GaleError
from gale.core.progress import console

if TYPE_CHECKING:
    from gale.engine.request import Engine, SamplingParams
    from gale.text.template import Message


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this one question and stop.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or name; the built-in model if not given.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message for the whole conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Makes answers reproducible.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
) -> None:
    """Talk with a model. Enter sends, /new starts over, Ctrl-C stops an answer, Ctrl-D or /quit leaves."""
    from gale.core.settings import settings
    from gale.engine.local import LocalEngine
    from gale.engine.request import SamplingParams
    from gale.registry.models import resolve_model
    from gale.text.template import Message

    engine = LocalEngine.load(resolve_model(model), threads=settings().threads)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opening = [Message(role="system", content=system)] if system else []
    with asyncio.Runner() as runner:
        try:
            if prompt is not None:
                runner.run(_answer(engine, [*opening, Message(role="user", content=prompt)], sampling))
            else:
                _converse(runner, engine, opening, sampling)
        finally:
            runner.run(engine.close())


def _converse(runner: asyncio.Runner, engine: Engine, opening: list[Message], sampling: SamplingParams) -> None:
    from gale.text.template import Message

    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[bold]{engine.model_id}[/] - /new starts over, /quit leaves")
    messages = list(opening)
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            console.print("[red]That was not valid UTF-8; please try again.")
            continue
        if text == "/quit":
            return
        if text == "/new":
            messages = list(opening)
            continue
        if not text:
            continue
        question = Message(role="user", content=text)
        try:
            answer = runner.run(_answer(engine, [*messages, question], sampling))
        except GaleError as error:
            console.print(f"[red]{error.message}", markup=True)
            continue
        messages += [question, Message(role="assistant", content=answer)]


async def _answer(engine: Engine, messages: list[Message], sampling: SamplingParams) -> str:
    """Print the answer as it comes and return it; Ctrl-C keeps what there is."""
    from gale.assistant.turn import answer
    from gale.engine.request import TextDelta

    parts: list[str] = []
    try:
        async for event in answer(engine, messages, sampling):
            if isinstance(event, TextDelta):
                parts.append(event.text)
                print(_printable(event.text), end="", flush=True)
    except asyncio.CancelledError:
        # asyncio.Runner turns Ctrl-C into a cancellation of this task.
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    print()
    return "".join(parts)


def _printable(text: str) -> str:
    """Text without control characters, so that no model can write escape sequences to a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c)[0] != "C" or c in "\u200d\ufe0f")
