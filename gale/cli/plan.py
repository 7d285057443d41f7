"""``gale plan``: what a training run would take, before it is paid for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gale.core import files
from gale.core.errors import GaleError

if TYPE_CHECKING:
    from gale.train.plan import Plan
    from gale.train.plan_model import PlannedModel

_GIB = 2**30
_MOST = 1e18  # of anything


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A model folder or name, or a pretraining recipe (.toml); else --parameters.")
    ] = None,
    parameters: Annotated[float | None, typer.Option(help="Size of the model instead, for example 7e9.")] = None,
    active: Annotated[
        float | None, typer.Option(help="Parameters that work on a token, in a mixture of experts.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, max=100_000, help="Layers, beside --parameters.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width, beside --parameters.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens known, where the model does not say.")] = 32_000,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens to train on.  [default: the recipe's, or 20 a parameter]")
    ] = None,
    device: Annotated[str, typer.Option(help="Name of the accelerator; --devices-known lists them.")] = "h100",
    devices: Annotated[int, typer.Option(help="How many.")] = 8,
    measure: Annotated[bool, typer.Option("--measure", help="Plan for this machine, measured now.")] = False,
    sequence: Annotated[int | None, typer.Option(help="Tokens in a row.  [default: the recipe's, or 2048]")] = None,
    batch_tokens: Annotated[
        float | None, typer.Option(help="Tokens in a step.  [default: the recipe's, or by the FLOPs]")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that is reached, for example 0.4.  [default: the device's]")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Rent of a device for an hour.  [default: about what it costs in dollars]")
    ] = None,
    electricity: Annotated[float, typer.Option(help="Price of a kWh.")] = 0.12,
    pue: Annotated[float, typer.Option(help="Energy of the whole site over that of the machines.")] = 1.2,
    watts: Annotated[float | None, typer.Option(help="Power of a device.  [default: its design power]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    devices_known: Annotated[bool, typer.Option("--devices-known", help="List the known devices and stop.")] = False,
) -> None:
    """Memory, layout, days, energy and money of a training run, each with its reason."""
    from gale.train.hardware import DEVICES, find_device, measure_device
    from gale.train.plan import plan as make

    if devices_known:
        for known in DEVICES.values():
            rent = f"about {known.price:g} an hour" if known.price else "no usual rent"
            typer.echo(
                f"{known.name:12} {known.flops / 1e12:6.0f} TFLOP/s  {known.memory / _GIB:4.0f} GiB  "
                f"{known.watts:5.0f} W  {known.utilisation:.0%} ({known.utilisation_reason})  {rent}"
            )
        return
    _check(
        {"--parameters": parameters, "--active": active, "--hidden": hidden}
        | {"--vocabulary": vocabulary, "--tokens": tokens, "--sequence": sequence, "--batch-tokens": batch_tokens}
        | {"--devices": devices, "--pue": pue, "--watts": watts},
        {"--price": price, "--electricity": electricity},
    )
    planned, given_tokens, given_sequence, given_batch = _model(
        model, parameters, active, layers, hidden, vocabulary, tokens
    )
    machine = measure_device() if measure else find_device(device)
    if watts is not None:
        machine = replace(machine, watts=watts)
    result = make(
        planned,
        machine,
        1 if measure else devices,
        tokens=tokens or given_tokens,
        sequence=sequence or given_sequence or 2048,
        batch_tokens=batch_tokens or given_batch,
        utilisation=mfu,
        pue=pue,
        electricity_price=electricity,
        price=price,
    )
    if as_json:
        typer.echo(json.dumps(result.as_data(), ensure_ascii=False, indent=2))
    else:
        _print(result)


def _check(positive: dict[str, float | None], at_least_zero: dict[str, float | None]) -> None:
    """Refuse figures that no run has; those beyond :data:`_MOST` would also take for ever to lay out."""
    wrong = [name for name, value in positive.items() if value is not None and not 0 < value <= _MOST]
    wrong += [name for name, value in at_least_zero.items() if value is not None and not 0 <= value <= _MOST]
    if wrong:
        raise GaleError(f"No run has such figures: {', '.join(wrong)}.", hint="See gale plan -h.")


def _model(
    model: str | None,
    parameters: float | None,
    active: float | None,
    layers: int | None,
    hidden: int | None,
    vocabulary: int,
    tokens: float | None,
) -> tuple[PlannedModel, float | None, int | None, float | None]:
    """The model, and the tokens, row and batch that a recipe asks for."""
    from gale.train.plan_model import from_folder, from_parameters, from_shape, vocabulary_of

    if (model is None) == (parameters is None):
        raise GaleError(
            "Say which model: a folder, a name or a recipe, or else --parameters.", hint="See gale plan -h."
        )
    if parameters is not None:
        made = from_parameters(parameters, active=active, layers=layers, hidden=hidden, vocabulary=vocabulary)
        return made, None, None, None
    assert model is not None
    if not model.endswith(".toml"):
        from gale.registry.models import resolve_model

        return from_folder(resolve_model(model)), None, None, None
    from gale.core.recipe import load_recipe
    from gale.train.recipe import PretrainRecipe

    path = files.resolve(model)
    recipe = load_recipe(path, PretrainRecipe)
    shape, step = recipe.model, recipe.batch_rows * recipe.row_tokens
    made = from_shape(
        Path(model).name,
        layers=shape.layers,
        hidden=shape.hidden_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate_size,
        vocabulary=vocabulary_of(recipe.data) or vocabulary,
        gated=True,
        tied=shape.tied_embeddings,
    )
    return made, float(step * recipe.steps), recipe.row_tokens, float(step)


def _print(result: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from gale.train.layout import SHARDINGS
    from gale.train.report import count

    model, why = result.model, result.reasons
    sizes = f"{count(model.parameters)} parameters"
    if model.active != model.parameters:
        sizes += f", {count(model.active)} of them for a token"
    shape = f"{model.layers} layers, {model.hidden} wide, {model.vocabulary:,} tokens known"
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    rows = [
        (
            "model",
            model.name,
            f"{sizes}; {shape}",
        ),
        ("tokens", count(result.tokens), why["tokens"]),
        ("step", f"{count(result.batch_tokens)} tokens", why["batch"]),
        ("FLOPs", f"{result.flops:.3g}", why["flops"]),
        ("devices", f"{result.devices:,} x {result.device.name}", why["rate"]),
    ]
    if result.layout:
        layout, memory = result.layout, result.layout.memory
        rows += [
            ("layout", f"data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline}", why["layout"]),
            ("sharded", SHARDINGS[layout.sharding], f"among the {layout.data} that share the batch"),
            (
                "memory",
                f"{size(memory.total)} a device",
                f"weights {size(memory.weights)}, gradients {size(memory.gradients)}, optimiser "
                f"{size(memory.optimiser)}, activations {size(memory.activations)} (one row at a time)",
            ),
        ]
    else:
        rows.append(("layout", "none", why["layout"]))
    rows += [
        ("time", _time(result.days), f"{result.device_hours:,.4g} device-hours"),
        ("energy", f"{result.energy_kwh:,.4g} kWh", why["energy"]),
        ("electricity", f"{result.electricity_cost:,.2f}", why["electricity"]),
        ("rent", "unknown" if result.rent is None else f"{result.rent:,.2f}", why["rent"]),
    ]
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def size(number: float) -> str:
    """Bytes as a person would say them."""
    return f"{number / _GIB:.1f} GiB" if number >= _GIB / 10 else f"{number / 2**20:.1f} MiB"


def _time(days: float) -> str:
    from gale.train.report import duration

    return duration(days * 86400)
