"""``gale data ...``"""

from __future__ import annotations

from typing import Annotated

import typer

from gale.cli.options import DryRunOption, OutOption, OverridesArgument, RecipeArgument, output_folder, read_recipe

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `prepare` a subcommand although it is the only one so far."""


RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Clean and tokenise on this Ray cluster (host:port, or auto) in place of the local cores.",
    ),
]


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
    for name, split in sorted(manifest["splits"].items()):
        typer.echo(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
    typer.echo(f"Written to {folder}")
