"""The ``gale`` command: verbs registered, errors turned into messages."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

import gale
from gale.cli import admin, chat, data, eval, model, plan, serve, train
from gale.core.errors import GaleError
from gale.core.logging import configure_logging
from gale.core.printable import printable
from gale.core.progress import console
from gale.core.settings import settings

app = typer.Typer(
    name="gale",
    help="Your text to a model, the model to a service, the service to people.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(model.app, name="model")
app.add_typer(admin.app, name="admin")
app.command("plan")(plan.plan)
app.command("eval")(eval.evaluate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gale {gale.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of every verb."""


def main() -> None:
    """Entry point: a :class:`GaleError` becomes its message and exit code, Ctrl-C a quiet 130."""
    try:
        configure_logging(settings().log_level)
        app()
    except GaleError as error:
        # Messages quote files, which come from anywhere.
        console.print(f"[bold red]Error:[/] {escape(printable(error.message))}", soft_wrap=True)
        if error.hint:
            console.print(f"[bold]Hint:[/] {escape(printable(error.hint))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
