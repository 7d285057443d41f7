"""``gale data ...``"""

from __future__ import annotations

import typer

from gale.cli.options import DryRunOption, OutOption, OverridesArgument, RecipeArgument, output_folder, read_recipe

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `prepare` a subcommand although it is the only one so far."""


@app.command()
def prepare(
    recipe: RecipeArgument, overrides: OverridesArgument = None, out: OutOption = None, dry_run: DryRunOption = False
) -> None:
    """Read sources, clean them, drop exact duplicates, and write packed token shards with a manifest."""
    from gale.data.prepare import prepare as run
    from gale.data.recipe import DataRecipe

    settings = read_recipe(recipe, DataRecipe, overrides, dry_run)
    folder = output_folder(out, "data")
    manifest = run(settings, folder)
    for name, split in sorted(manifest["splits"].items()):
        typer.echo(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
    typer.echo(f"Written to {folder}")
