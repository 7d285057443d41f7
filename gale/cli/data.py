"""``gale data ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gale.cli.options import (
    DryRunOption,
    OutOption,
    OverridesArgument,
    RayOption,
    RecipeArgument,
    output_folder,
    read_recipe,
)

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    ray: RayOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Read sources, clean and deduplicate them, and write packed token shards with a manifest and a report."""
    from gale.data.prepare import prepare as run
    from gale.data.recipe import DataRecipe
    from gale.data.report import REPORT

    settings = read_recipe(recipe, DataRecipe, overrides, dry_run)
    folder = output_folder(out, "data")
    manifest = run(settings, folder, ray=ray)
    read, kept = (sum(source[key] for source in manifest["sources"]) for key in ("read", "kept"))
    typer.echo(f"kept {kept:,} of {read:,} documents; why the others went is in {REPORT}")
    if links := sum(source.get("outside_links", 0) for source in manifest["sources"]):
        typer.echo(f"{links:,} links that lead out of their folders were passed over; name what they lead to instead")
    for name, split in sorted(manifest["splits"].items()):
        typer.echo(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
    typer.echo(f"Written to {folder}")


@app.command()
def constitution(
    principles: Annotated[Path, typer.Argument(help="TOML file of principles; see recipes/constitution.toml.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="A prompt a line (.txt), or JSON lines with {prompt}.")],
    out: Annotated[Path, typer.Option("--out", help="File of preferences (.jsonl); a begun one is continued.")],
    overrides: OverridesArgument = None,
    model: Annotated[str | None, typer.Option("--model", help="Model folder or name.  [default: built-in]")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the answers.")] = 0,
    dry_run: DryRunOption = False,
) -> None:
    """Let a model judge its own answers by written principles, and write preferences for `gale train`."""
    from gale.core import files
    from gale.data.principles import Constitution
    from gale.registry.models import resolve_model

    settings = read_recipe(principles, Constitution, overrides, dry_run)
    folder = resolve_model(model)

    from gale.data.constitution import constitutional_feedback as run

    file = files.resolve(out)
    counts = run(settings, folder, files.resolve(prompts), file, seed=seed)
    for name, count in counts.items():
        typer.echo(f"{name.replace('_', ' ')}: {count:,}")
    typer.echo(f"Written to {file}")
