"""Options that several verbs share."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from gale.core import files
from gale.core.recipe import Completion, Recipe, load_recipe
from gale.core.settings import settings

RecipeArgument = Annotated[Path, typer.Argument(help="A TOML recipe; see recipes/.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Overrides as key=value, for example steps=500 optimiser.learning_rate=1e-3; "
        "a relative path counts from the folder you are in."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result.  [default: a new one under GALE_HOME/runs]")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Run on the Ray cluster at this address ('local' starts one here)."),
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Processes on the Ray cluster.")]
DbOption = Annotated[
    str | None,
    typer.Option(
        "--db",
        envvar="GALE_DB",
        help="Database, as sqlite:///path or postgresql+asyncpg://...; one in GALE_HOME if not given.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]

RecipeType = TypeVar("RecipeType", bound=Recipe)


def read_recipe(
    path: Path,
    kind: type[RecipeType],
    overrides: list[str] | None,
    dry_run: bool,
    complete: Completion | None = None,
) -> RecipeType:
    """Load a recipe, see :func:`gale.core.recipe.load_recipe`; with ``dry_run`` print it and exit."""
    recipe = load_recipe(path, kind, overrides or [], complete=complete)
    if dry_run:
        typer.echo(json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, indent=2))
        raise typer.Exit
    return recipe


def output_folder(out: Path | None, name: str, *, resume: bool = False) -> Path:
    """``out``, or a new folder named after the verb and the time; resuming needs to be told which run."""
    if out is not None:
        return files.resolve(out)
    if resume:
        raise typer.BadParameter("give --out, the folder of the run to go on with", param_hint="--resume")
    return settings().runs / f"{name}-{datetime.now(tz=UTC):%Y%m%d-%H%M%S}"
