"""``gale train grow``: a trained model becomes a larger one that computes the same, and learns on from there.

The growing is :mod:`gale.model.grow`; this file measures what it did to the function, writes that down, and hands the
grown model to the one loop. Nothing of the base's optimiser is used: its moments belong to other matrices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gale.core import files
from gale.core.errors import ModelError
from gale.core.progress import console
from gale.data.prepare import ready_data
from gale.data.shards import read_manifest
from gale.model.checkpoint import fingerprint, load_model
from gale.model.config import Experts, ModelConfig
from gale.model.grow import deepen, logit_difference, upcycle, widen
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.loop import refuse_second_run, run
from gale.train.model_folder import check_fits, export_decoder
from gale.train.next_token import next_token
from gale.train.parallel import World, joined
from gale.train.recipe import GrowRecipe, Growth
from gale.train.samples import decoder_samples
from gale.train.stage import Stage

GROWTH = "growth.json"
# Rounding in fp32, as a share of the largest score; tiny models stay a hundred times below.
_ROUNDING = 1e-4
_MEASURED_TOKENS = 256


def grow(recipe: GrowRecipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Grow ``recipe.base`` and train the result; see :func:`gale.train.loop.run`.

    The finished folder ``out/model`` has a ``growth.json`` that tells where the model began.
    """
    with joined() as world:
        with world.together():  # before the work of growing, and before the first process may begin to write
            if world.main and not resume:
                refuse_second_run(out)
        return run(_stage(recipe, world), out, resume=resume)


def _stage(recipe: GrowRecipe, world: World) -> Stage[Decoder]:
    """The stage over the grown model, once it has been said what growing did."""
    data = ready_data(recipe.data)
    check_fits(recipe.base, ModelConfig.load(recipe.base), data, recipe.row_tokens)
    tokenizer = Tokenizer.load(data / "tokenizer")
    objective = next_token(recipe, data, loss_on="all", long="split")
    base = load_model(recipe.base, dtype=torch.float32)
    grown = grown_from(base, recipe.grow, recipe.seed)
    report = measure(recipe, base, grown)
    if world.main:
        with torch.no_grad():
            report["held_out"] = {
                name: objective.evaluate(model, World()) for name, model in (("base", base), ("grown", grown))
            }
        tell(report)

    def build(dtype: torch.dtype) -> Decoder:
        return grown_from(load_model(recipe.base, dtype=torch.float32), recipe.grow, recipe.seed).to(dtype)

    def export(model: Decoder, folder: Path, dtype: torch.dtype) -> None:
        export_decoder(model, tokenizer, folder, dtype)
        files.write_json(folder / GROWTH, report)

    return Stage(
        name="grow",
        recipe=recipe,
        data=(data,),
        facts={
            "data_fingerprint": read_manifest(data)["fingerprint"],
            "base_fingerprint": report["base_fingerprint"],
        },
        build=build,
        objective=objective,
        export=export,
        flops_per_token=grown.config.flops_per_token(recipe.row_tokens),
        samples=decoder_samples(recipe, tokenizer, grown.config.context_length, chat=False),
    )


def grow_only(recipe: GrowRecipe, folder: Path) -> dict[str, Any]:
    """Write the untrained grown model as ``folder`` and return its report.

    The weights are written in fp32 whatever the recipe's ``export`` is: rounded to bf16, noise would no longer cancel.
    """
    base = load_model(recipe.base, dtype=torch.float32)
    grown = grown_from(base, recipe.grow, recipe.seed)
    report = measure(recipe, base, grown)
    tell(report)
    with files.new_directory(folder, marker="config.json") as temporary:
        export_decoder(grown, Tokenizer.load(recipe.base), temporary, torch.float32)
        files.write_json(temporary / GROWTH, report)
    return report


def grown_from(base: Decoder, growth: Growth, seed: int) -> Decoder:
    """``base`` made deeper, wider and a mixture of experts, as far as ``growth`` asks. Raises :class:`ModelError`."""
    model = base
    if growth.layers is not None:
        model = deepen(model, growth.layers, placement=growth.placement, preserve=growth.preserve)
    sizes = growth.model_dump(include={"hidden_size", "intermediate_size", "heads", "kv_heads"}, exclude_none=True)
    if sizes:
        model = widen(model, **sizes, noise=growth.noise, seed=seed)
    if growth.experts is not None:
        experts = Experts(
            **growth.experts.model_dump(exclude={"redrawn"}), intermediate_size=model.config.intermediate_size
        )
        model = upcycle(model, experts, redrawn=growth.experts.redrawn, seed=seed)
    return model


def preserves(growth: Growth) -> bool:
    """Whether the grown model is meant to compute what the base does."""
    stacked = growth.layers is not None and not growth.preserve
    redrawn = growth.experts is not None and growth.experts.redrawn > 0
    return not stacked and not redrawn


def measure(recipe: GrowRecipe, base: Decoder, grown: Decoder) -> dict[str, Any]:
    """What was done, from what, and how far the scores on random tokens are from the base's.

    Raises :class:`ModelError` where a growth that should keep the function did not; only unsound weights can do that.
    """
    difference, largest = logit_difference(base, grown, tokens=_MEASURED_TOKENS, seed=recipe.seed)
    if preserves(recipe.grow) and not difference <= _ROUNDING * max(1.0, largest):
        raise ModelError(
            f"The grown model's scores differ from the base's by {difference:.3g} (largest score {largest:.3g}), "
            "more than rounding explains.",
            hint="Look whether the base's weights are sound: gale eval tells.",
        )
    return {
        "base_fingerprint": fingerprint(recipe.base),
        "growth": recipe.grow.model_dump(mode="json"),
        "seed": recipe.seed,
        "parameters": {name: sum(p.numel() for p in m.parameters()) for name, m in (("base", base), ("grown", grown))},
        "function_preserving": preserves(recipe.grow),
        "max_logit_difference": difference,
        "largest_logit": largest,
        "measured_tokens": min(_MEASURED_TOKENS, base.config.context_length),
        "optimiser": "fresh",
    }


def tell(report: dict[str, Any]) -> None:
    """Say what was grown and what it did to the function."""
    before, after = (report["parameters"][name] / 1e6 for name in ("base", "grown"))
    lines = [
        f"Grown from {before:.2f}M to {after:.2f}M parameters; the optimiser starts afresh.",
        f"Largest difference of a logit on {report['measured_tokens']} random tokens: "
        f"{report['max_logit_difference']:.3g} (largest logit {report['largest_logit']:.3g}).",
    ]
    if not report["function_preserving"]:
        what = []
        if report["growth"]["layers"] and not report["growth"]["preserve"]:
            what.append("whole copies of layers")
        if report["growth"]["experts"] and report["growth"]["experts"]["redrawn"]:
            what.append(f"{report['growth']['experts']['redrawn']:.0%} of each expert's units drawn anew")
        lines.append(f"This growth does not keep the function ({' and '.join(what)}): it begins worse than the base.")
    if held_out := report.get("held_out"):
        lines += [
            f"{name}: {held_out['base'][name]:.4f} nats per token before, {loss:.4f} after growing"
            for name, loss in held_out["grown"].items()
        ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
