"""``gale train ...``: one command a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gale.cli.options import (
    DryRunOption,
    OutOption,
    OverridesArgument,
    RecipeArgument,
    ResumeOption,
    output_folder,
    read_recipe,
)

app = typer.Typer(help="Train a tokenizer or a model.", no_args_is_help=True)


@app.command()
def tokenizer(
    recipe: RecipeArgument, overrides: OverridesArgument = None, out: OutOption = None, dry_run: DryRunOption = False
) -> None:
    """Learn a byte-level BPE vocabulary and report how many bytes a token holds on held-out text."""
    from gale.data.recipe import TokenizerRecipe
    from gale.data.tokenizer_training import train_tokenizer

    settings = read_recipe(recipe, TokenizerRecipe, overrides, dry_run)
    folder = output_folder(out, "tokenizer")
    report = train_tokenizer(settings, folder)
    for split, value in report["bytes_per_token"].items():
        typer.echo(f"{split}: {value} bytes per token")
    typer.echo(f"{report['vocabulary_size']} tokens, written to {folder}")


@app.command()
def pretrain(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a new model on prepared text. Killed at any moment, `--resume` goes on with the same curve."""
    from gale.train.pretrain import pretrain as run
    from gale.train.recipe import PretrainRecipe

    settings = read_recipe(recipe, PretrainRecipe, overrides, dry_run)
    folder = output_folder(out, "pretrain", resume=resume)
    _report(run(settings, folder, resume=resume), folder)


@app.command()
def grow(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    only: Annotated[bool, typer.Option("--only", help="Write the grown model and stop, without training it.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Make a trained model deeper, wider or a mixture of experts, and train it on.

    It begins where its base stands: the function is kept, unless the recipe asks for a growth that cannot keep it.
    """
    from gale.train.grow import grow as run
    from gale.train.grow import grow_only
    from gale.train.recipe import GrowRecipe

    settings = read_recipe(recipe, GrowRecipe, overrides, dry_run)
    folder = output_folder(out, "grow", resume=resume)
    if only:
        grow_only(settings, folder / "model")
        typer.echo(f"Model written to {folder / 'model'}")
    else:
        _report(run(settings, folder, resume=resume), folder)


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Fine-tune a base model on conversations, with the loss on the assistant's tokens only."""
    from gale.train.recipe import SftRecipe
    from gale.train.sft import sft as run

    settings = read_recipe(recipe, SftRecipe, overrides, dry_run)
    folder = output_folder(out, "sft", resume=resume)
    _report(run(settings, folder, resume=resume), folder)


def _report(summary: dict[str, Any], folder: Path) -> None:
    final = summary["final"]
    if final:
        typer.echo(f"final loss {final['loss']!r} at {final['tokens']:,} tokens")
    else:
        typer.echo("The run was complete already, but its metrics.jsonl is gone, and its losses with it.")
    for name, loss in final.get("held_out", {}).items():
        typer.echo(f"{name}: {loss:.4f} nats per token")
    typer.echo(f"Model written to {folder / 'model'}; curves in {folder / 'curves.svg'}")
