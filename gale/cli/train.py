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


@app.command()
def reward(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a model that scores answers, from pairs of which people preferred one."""
    from gale.train.recipe import RewardRecipe
    from gale.train.reward import reward as run

    settings = read_recipe(recipe, RewardRecipe, overrides, dry_run)
    folder = output_folder(out, "reward", resume=resume)
    _report(run(settings, folder, resume=resume), folder, unit="nats per pair")


@app.command()
def dpo(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a chat model on preferences directly (DPO), without a reward model."""
    from gale.train.dpo import dpo as run
    from gale.train.recipe import DpoRecipe

    settings = read_recipe(recipe, DpoRecipe, overrides, dry_run)
    folder = output_folder(out, "dpo", resume=resume)
    _report(run(settings, folder, resume=resume), folder, unit="per pair")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that a run with a table `lora` left.")],
    base: Annotated[Path, typer.Option("--base", help="Model folder that the adapter was trained over.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the whole model.")],
    fp32: Annotated[bool, typer.Option("--fp32", help="Write fp32 instead of bf16.")] = False,
) -> None:
    """Add a LoRA adapter to the weights of its base, and write a model folder that needs no adapter."""
    import torch

    from gale.core import files
    from gale.model.adapter_folder import merge_adapter

    folder = files.resolve(out)
    dtype = torch.float32 if fp32 else torch.bfloat16
    merge_adapter(files.resolve(adapter), files.resolve(base), folder, dtype=dtype)
    typer.echo(f"Model written to {folder}")


def _report(summary: dict[str, Any], folder: Path, *, unit: str = "nats per token") -> None:
    final = summary["final"]
    if final:
        typer.echo(f"final loss {final['loss']!r} at {final['tokens']:,} tokens")
    else:
        typer.echo("The run was complete already, but its metrics.jsonl is gone, and its losses with it.")
    for name, figure in final.get("held_out", {}).items():
        typer.echo(f"{name}: {figure:.1%}" if name.endswith("_accuracy") else f"{name}: {figure:.4f} {unit}")
    typer.echo(f"Model written to {folder / 'model'}; curves in {folder / 'curves.svg'}")
