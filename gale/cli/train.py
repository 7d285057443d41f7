"""``gale train ...``: one command a stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

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
from gale.core import files
from gale.core.recipe import Completion, Recipe

Train = Callable[..., dict[str, Any]]

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
    depth: Annotated[
        int | None, typer.Option(help="Derive what the recipe does not say from this many layers, and print it.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="The same from the floating-point operations to spend, for example 1e15.")
    ] = None,
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

    turned = None if depth is None and flops is None else _dial(depth, flops, dry_run)
    settings = read_recipe(recipe, PretrainRecipe, overrides, dry_run, turned)
    folder = output_folder(out, "pretrain", resume=resume)
    _report(_run(run, settings, folder, resume, ray, workers), folder)


@app.command()
def grow(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    ray: RayOption = None,
    workers: WorkersOption = 1,
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
        _report(_run(run, settings, folder, resume, ray, workers), folder)


# What trains, and the recipe that it takes; asked for when the command runs, since torch is slow to start.
Stage = Callable[[], tuple[Train, type[Recipe]]]


def _stage(*, unit: str = "nats per token") -> Callable[[Stage], Stage]:
    """Register a stage that has the options of all, under the name and with the help of the function that finds it."""

    def register(stage: Stage) -> Stage:
        @app.command(stage.__name__, help=stage.__doc__)
        def command(
            recipe: RecipeArgument,
            overrides: OverridesArgument = None,
            out: OutOption = None,
            resume: ResumeOption = False,
            ray: RayOption = None,
            workers: WorkersOption = 1,
            dry_run: DryRunOption = False,
        ) -> None:
            train, kind = stage()
            settings = read_recipe(recipe, kind, overrides, dry_run)
            folder = output_folder(out, stage.__name__, resume=resume)
            _report(_run(train, settings, folder, resume, ray, workers), folder, unit=unit)

        return stage

    return register


@_stage()
def sft() -> tuple[Train, type[Recipe]]:
    """Fine-tune a base model on conversations, with the loss on the assistant's tokens only."""
    from gale.train.recipe import SftRecipe
    from gale.train.sft import sft as train

    return train, SftRecipe


@_stage(unit="nats per pair")
def reward() -> tuple[Train, type[Recipe]]:
    """Train a model that scores answers, from pairs of which people preferred one."""
    from gale.train.recipe import RewardRecipe
    from gale.train.reward import reward as train

    return train, RewardRecipe


@_stage(unit="nats per text")
def classifier() -> tuple[Train, type[Recipe]]:
    """Train a model that gives texts labels, with probabilities calibrated on rows of their own."""
    from gale.train.classifier import classifier as train
    from gale.train.recipe import ClassifierRecipe

    return train, ClassifierRecipe


@_stage(unit="per pair")
def dpo() -> tuple[Train, type[Recipe]]:
    """Train a chat model on preferences directly (DPO), without a reward model."""
    from gale.train.dpo import dpo as train
    from gale.train.recipe import DpoRecipe

    return train, DpoRecipe


@app.command()
def rl(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Let a model learn from its own answers (GRPO or PPO), judged by a reward model or by a program."""
    from gale.train.rl import rl as run
    from gale.train.rl_recipe import RlRecipe

    settings = read_recipe(recipe, RlRecipe, overrides, dry_run)
    folder = output_folder(out, settings.algorithm, resume=resume)
    final = run(settings, folder, resume=resume)["final"]
    for name in ("reward", "gold", "kl", "answer_tokens"):
        if name in final:
            typer.echo(f"{name} of the last answers: {final[name]:.4f}")
    for name, figure in final.get("held_out", {}).items():
        typer.echo(f"{name}: {figure:.4f}")
    typer.echo(f"Model written to {folder / 'model'}; report in {folder / 'report.html'}")


@app.command("best-of-n")
def best_of_n(
    recipe: RecipeArgument, overrides: OverridesArgument = None, out: OutOption = None, dry_run: DryRunOption = False
) -> None:
    """Answer prompts several times and keep the best answers, as data for supervised fine-tuning."""
    from gale.train.best_of_n import BestOfNRecipe
    from gale.train.best_of_n import best_of_n as run

    settings = read_recipe(recipe, BestOfNRecipe, overrides, dry_run)
    folder = output_folder(out, "best-of-n")
    summary = run(settings, folder)
    for point in summary["best_of"]:
        gold = f", gold {point['gold']:.4f}" if "gold" in point else ""
        typer.echo(f"best of {point['n']}: reward {point['reward']:.4f}{gold}, {point['kl']:.2f} nats from the model")
    typer.echo(f"{summary['kept']} of {summary['prompts']} answers kept, in {folder / 'best.jsonl'}")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that a run with a table `lora` left.")],
    base: Annotated[Path, typer.Option("--base", help="Model folder that the adapter was trained over.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the whole model.")],
    fp32: Annotated[bool, typer.Option("--fp32", help="Write fp32 instead of bf16.")] = False,
) -> None:
    """Add a LoRA adapter to the weights of its base, and write a model folder that needs no adapter."""
    import torch

    from gale.model.adapter_folder import merge_adapter

    folder = files.resolve(out)
    dtype = torch.float32 if fp32 else torch.bfloat16
    merge_adapter(files.resolve(adapter), files.resolve(base), folder, dtype=dtype)
    typer.echo(f"Model written to {folder}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run: the --out of a training command.")],
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the metrics as TensorBoard event files.")
    ] = False,
) -> None:
    """Make a run's report.html again from its metrics: when it is done, while it goes on, or after it was killed."""
    from gale.train.report import write_report

    run = files.resolve(run)
    typer.echo(f"Written to {write_report(run)}")
    if tensorboard:
        from gale.train.tensorboard import write_tensorboard

        typer.echo(f"Written to {write_tensorboard(run)}; look at it with: tensorboard --logdir {run}")


def _dial(depth: int | None, flops: float | None, dry_run: bool) -> Completion:
    """What completes a recipe by the dial, and prints every value with its reason."""

    def complete(content: dict[str, Any], find: Callable[[str], Path]) -> None:
        from rich.table import Table

        from gale.core.progress import console
        from gale.train.dial import dial_recipe
        from gale.train.report import count

        if not isinstance(content.get("data"), str):
            return  # which the check of the recipe will say
        dial = dial_recipe(content, find(content["data"]), depth=depth, flops=flops, prepare=not dry_run)
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(style="dim")
        for key, value in dial.values.items():
            table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value}", dial.reasons[key])
        console.print(table)
        console.print(f"{count(dial.parameters)} parameters, {count(dial.tokens)} tokens, {dial.flops:.3g} FLOPs")

    return complete


def _run(train: Train, recipe: Recipe, folder: Path, resume: bool, ray: str | None, workers: int) -> dict[str, Any]:
    """Run a stage here, or on a Ray cluster."""
    if ray is None:
        return train(recipe, folder, resume=resume)
    import torch

    from gale.train.on_ray import run_on_ray

    gpus = torch.cuda.is_available()
    return run_on_ray(train, recipe, folder, resume=resume, address=ray, workers=workers, gpus=gpus)


def _report(summary: dict[str, Any], folder: Path, *, unit: str = "nats per token") -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one talks
    final = summary["final"]
    if final:
        typer.echo(f"final loss {final['loss']!r} at {final['tokens']:,} tokens")
    else:
        typer.echo("The run was complete already, but its metrics.jsonl is gone, and its losses with it.")
    for name, figure in final.get("held_out", {}).items():
        typer.echo(f"{name}: {figure:.1%}" if name.endswith("_accuracy") else f"{name}: {figure:.4f} {unit}")
    typer.echo(f"Model written to {folder / 'model'}; report in {folder / 'report.html'}")
