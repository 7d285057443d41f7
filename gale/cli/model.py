"""``gale model ...``"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gale.core import files
from gale.core.errors import GaleError
from gale.core.printable import printable

app = typer.Typer(help="Look after models: list, show, import and export them.", no_args_is_help=True)

ModelArgument = Annotated[str, typer.Argument(help="Model folder, GGUF file or name.")]


class Format(StrEnum):
    """Where a model goes."""

    hf = "hf"
    gguf = "gguf"


class Number(StrEnum):
    """Number formats of exported weights."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    q8_0 = "q8_0"


@app.command("list")
def list_() -> None:
    """List the built-in model and those under GALE_HOME/models."""
    from gale.core.errors import ModelError
    from gale.registry.models import known_models
    from gale.registry.summary import ModelSummary

    typer.echo(f"{'name':24} {'parameters':>15} {'context':>9} {'numbers':>8} {'size':>12}  licence")
    for name, folder in known_models().items():
        try:
            model = ModelSummary.of(folder)
        except ModelError as error:  # one that is broken must not hide the others
            typer.echo(printable(f"{name:24} cannot be opened: {error.message}"))
            continue
        size = f"{model.size / 1e6:,.1f} MB"
        typer.echo(
            printable(
                f"{name:24} {model.parameters:15,} {model.config.context_length:9,} {model.dtype:>8} {size:>12}  "
                f"{model.licence or '-'}"
            )
        )


@app.command()
def show(
    model: ModelArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare it with its checksum from the import.")
    ] = False,
) -> None:
    """Print a model's shape, parameters, context, licence, size and checksums."""
    from gale.registry.models import resolve_model
    from gale.registry.summary import ModelSummary
    from gale.registry.transfer import CHECKSUMS, changed_files, checksums

    folder = resolve_model(model)
    for name, value in ModelSummary.of(folder).lines():
        typer.echo(printable(f"{name + ':':14} {value}"))
    sums = checksums(folder)
    for name, digest in sums.items():
        typer.echo(printable(f"sha256:        {digest}  {name}"))
    if verify:
        if not sums:
            raise GaleError(f"{folder} has no {CHECKSUMS}.", hint="`gale model import` writes it.")
        if changed := changed_files(folder):
            raise GaleError(f"Changed since the import: {', '.join(changed)}.", hint="Import the model again.")
        typer.echo("All files are what they were when the model was imported.")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A model folder in Hugging Face layout, or a GGUF file.")],
    name: Annotated[str | None, typer.Option(help="Name of the model.  [default: the folder's]")] = None,
    link: Annotated[bool, typer.Option("--link", help="Link to the files instead of copying them.")] = False,
) -> None:
    """Check a model and take it into GALE_HOME/models, where every command finds it by name."""
    from gale.registry.transfer import import_model

    target = import_model(source, name, link=link)
    typer.echo(f"Imported as {target.name}; talk to it with: gale chat --model {target.name}")


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[Format, typer.Option("--to", help="A Hugging Face folder, or one GGUF file for llama.cpp.")],
    out: Annotated[Path, typer.Option("--out", help="Folder (hf) or file (gguf) to write.")],
    dtype: Annotated[
        Number | None,
        typer.Option(help="Number format of the weights; q8_0 for gguf only.  [default: as stored]"),
    ] = None,
) -> None:
    """Write a model for other programs."""
    if to == Format.hf and dtype == Number.q8_0:
        raise typer.BadParameter("a Hugging Face folder has no q8_0", param_hint="--dtype")

    import torch

    from gale.core.model_folder import model_name
    from gale.registry.models import resolve_model
    from gale.registry.summary import ModelSummary
    from gale.registry.transfer import export_folder

    folder, out = resolve_model(model), files.resolve(out)
    if to == Format.hf:
        kinds = {Number.bf16: torch.bfloat16, Number.fp16: torch.float16, Number.fp32: torch.float32}
        export_folder(folder, out, dtype=kinds[dtype] if dtype else None)
    else:
        from gale.model.gguf_export import export_gguf

        export_gguf(folder, out, kind=dtype or ModelSummary.of(folder).dtype, name=model_name(folder))
    typer.echo(f"Written to {out}")
