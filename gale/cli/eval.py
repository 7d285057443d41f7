"""``gale eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gale.cli.options import DryRunOption, OverridesArgument, output_folder, read_recipe
from gale.core.printable import printable


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or name.")],
    overrides: OverridesArgument = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="What to measure.  [default: a short text in each language]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html, report.md and report.json.")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Measure a model: text, grammar, choices, labels, answers; with chance beside every score."""
    from gale.evals.recipe import DEFAULT_RECIPE, EvalRecipe
    from gale.registry.models import resolve_model

    settings = read_recipe(recipe or DEFAULT_RECIPE, EvalRecipe, overrides, dry_run)
    folder = resolve_model(model)

    from gale.core import files
    from gale.evals.page import to_html, to_markdown
    from gale.evals.report import evaluate as run

    report = run(folder, settings)
    page = to_markdown(report)
    typer.echo(printable(page))
    if out is not None:
        out = output_folder(out, "eval")
        files.write_json(out / "report.json", report)
        files.write_text(out / "report.md", page)
        files.write_text(out / "report.html", to_html(report))
        typer.echo(f"Written to {out}")
