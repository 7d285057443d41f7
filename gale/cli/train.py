"""``gale train ...``: one command a stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from gale.cli.options import (
    DryRunOption,
    OutOption,
    OverridesArgument,
    RayOption,
    RecipeArgument,
    ResumeOption,
    WorkersOption,
    output_folder,
    read_recipe,
)
from gale.core.recipe import Recipe

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
    ray: RayOption = None,
    workers: WorkersOption = 1,
    dry_run: DryRunOption = False,
) -> None:
    """Train a new model on prepared text. Killed at any moment, `--resume` goes on with the same curve.

    For several processes: torchrun --nproc-per-node 2 -m gale.cli train pretrain RECIPE --out DIR
    """
    from gale.train.pretrain import pretrain as run
    from gale.train.recipe import PretrainRecipe

    settings = read_recipe(recipe, PretrainRecipe, overrides, dry_run)
    folder = output_folder(out, "pretrain", resume=resume)
    _report(_run(run, settings, folder, resume, ray, workers), folder)


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    ray: RayOption = None,
    workers: WorkersOption = 1,
    dry_run: DryRunOption = False,
) -> None:
    """Fine-tune a base model on conversations, with the loss on the assistant's tokens only."""
    from gale.train.recipe import SftRecipe
    from gale.train.sft import sft as run

    settings = read_recipe(recipe, SftRecipe, overrides, dry_run)
    folder = output_folder(out, "sft", resume=resume)
    _report(_run(run, settings, folder, resume, ray, workers), folder)


def _run(
    train: Callable[..., dict[str, Any]], recipe: Recipe, folder: Path, resume: bool, ray: str | None, workers: int
) -> dict[str, Any]:
    """Run a stage here, or on a Ray cluster."""
    if ray is None:
        return train(recipe, folder, resume=resume)
    import torch

    from gale.train.on_ray import run_on_ray

    gpus = torch.cuda.is_available()
    return run_on_ray(train, recipe, folder, resume=resume, address=ray, workers=workers, gpus=gpus)


def _report(summary: dict[str, Any], folder: Path) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one talks
    final = summary["final"]
    if final:
        typer.echo(f"final loss {final['loss']!r} at {final['tokens']:,} tokens")
    else:
        typer.echo("The run was complete already, but its metrics.jsonl is gone, and its losses with it.")
    for name, loss in final.get("held_out", {}).items():
        typer.echo(f"{name}: {loss:.4f} nats per token")
    typer.echo(f"Model written to {folder / 'model'}; curves in {folder / 'curves.svg'}")
