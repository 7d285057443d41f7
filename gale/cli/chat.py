"""``gale chat``: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from gale.cli.terminal import read_message
from gale.core.errors import GaleError
from gale.core.printable import printable
from gale.core.progress import console

if TYPE_CHECKING:
    from gale.engine.request import Engine, SamplingParams
    from gale.text.template import Message


def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this one question and stop.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, GGUF file or name; built-in if not given.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message for the whole conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Makes answers reproducible.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
) -> None:
    """Talk with a model. Enter sends, /new starts over, Ctrl-C stops an answer, Ctrl-D or /quit leaves."""
    from gale.engine.local import LocalEngine
    from gale.engine.request import SamplingParams
    from gale.registry.models import resolve_model
    from gale.text.template import Message

    engine = LocalEngine.load(resolve_model(model))
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
        console.print(f"[bold]{escape(engine.model_id)}[/] - /new starts over, /quit leaves")
    messages = list(opening)
    while True:
        try:
            text = read_message("> ").strip()
            if text == "/quit":
                return
            if text == "/new":
                messages = list(opening)
                continue
            if not text:
                continue
            question = Message(role="user", content=text)
            answer = _stoppable(runner, _answer(engine, [*messages, question], sampling))
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print("\n/quit or Ctrl-D leaves")
            continue
        except (GaleError, UnicodeDecodeError) as error:
            problem = error if isinstance(error, GaleError) else GaleError("That was not valid UTF-8.")
            if not interactive:  # a program is talking: it must learn that something went wrong
                raise problem from error
            console.print(f"[red]{escape(problem.message)}")
            continue
        messages += [question, Message(role="assistant", content=answer)]


def _stoppable(runner: asyncio.Runner, work: Coroutine[None, None, str]) -> str:
    """The answer; nothing if Ctrl-C came before it had begun."""
    try:
        return runner.run(work)
    except KeyboardInterrupt:
        work.close()
        print()
        return ""


async def _answer(engine: Engine, messages: list[Message], sampling: SamplingParams) -> str:
    """Print the answer as it comes and return it; Ctrl-C keeps what there is."""
    from gale.assistant.turn import answer
    from gale.engine.request import TextDelta

    parts: list[str] = []
    try:
        async for event in answer(engine, messages, sampling):
            if isinstance(event, TextDelta):
                parts.append(event.text)
                print(printable(event.text), end="", flush=True)
    except asyncio.CancelledError:
        # asyncio.Runner turns Ctrl-C into a cancellation of this task.
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    print()
    return "".join(parts)
