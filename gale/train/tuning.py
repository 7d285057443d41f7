"""What stages that start from a model share: opening it, adapters or all of it, and writing the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from gale.core import files
from gale.core.progress import console
from gale.data.prepare import ready_data
from gale.data.shards import TokenSplit, read_manifest
from gale.model.adapter_folder import ADAPTER_CONFIG, load_adapter, read_adapter, save_adapter
from gale.model.checkpoint import fingerprint, load_model
from gale.model.config import ModelConfig
from gale.model.lora import LoraShape, add_lora
from gale.model.reward_model import RewardModel, is_reward_model, load_reward_model, reward_config
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train.model_folder import check_fits, export_decoder, export_reward_model
from gale.train.pairs import PairedRows
from gale.train.recipe import Lora, PreferenceRecipe, TuningRecipe
from gale.train.samples import decoder_samples
from gale.train.stage import Objective, Stage

ModelType = TypeVar("ModelType", Decoder, RewardModel)


def tuned_decoder(
    name: str,
    recipe: TuningRecipe,
    data: Path,
    objective: Objective[Decoder],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Stage[Decoder]:
    """The stage ``name`` that trains the decoder ``recipe.base``, or adapters beside it, on prepared ``data``.

    ``facts`` are those of :class:`gale.train.stage.Stage` beyond the fingerprints.
    """
    config = ModelConfig.load(recipe.base)
    stage = _tuned(name, recipe, data, objective, facts, config, 0.0, _open_decoder, export_decoder)
    tokenizer = Tokenizer.load(data / "tokenizer")
    return replace(stage, samples=decoder_samples(recipe, tokenizer, config.context_length, chat=True))


def tuned_reward_model(
    name: str,
    recipe: TuningRecipe,
    data: Path,
    objective: Objective[RewardModel],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Stage[RewardModel]:
    """As :func:`tuned_decoder` for a reward model, which begins as one or as a decoder."""
    config = reward_config(recipe.base) if is_reward_model(recipe.base) else ModelConfig.load(recipe.base)
    idle = 6.0 * config.hidden_size * config.vocabulary_size  # of the output head, which nobody asks
    return _tuned(name, recipe, data, objective, facts, config, idle, _open_reward_model, export_reward_model)


def ready_pairs(recipe: PreferenceRecipe) -> tuple[Path, PairedRows, dict[str, PairedRows], dict[str, Any]]:
    """Prepared preferences: their folder, the pairs to train on, those held out, and how many there are of each."""
    data = ready_data(recipe.data)
    splits = {
        name: PairedRows(TokenSplit(data, name), row_tokens=recipe.row_tokens, seed=recipe.seed)
        for name in ("train", *(name for name in read_manifest(data)["splits"] if name != "train"))
    }
    counts = {name: {"used": len(rows), "cut": rows.cut, "dropped": rows.dropped} for name, rows in splits.items()}
    for name, count in counts.items():
        if count["cut"] or count["dropped"]:
            console.print(
                f"{name}: {count['used']} pairs, {count['cut']} with a prompt cut to row_tokens; "
                f"{count['dropped']} did not fit and are left out",
                style="yellow",
                soft_wrap=True,
            )
    return data, splits.pop("train"), splits, {"pairs": counts}


def _tuned(
    name: str,
    recipe: TuningRecipe,
    data: Path,
    objective: Objective[ModelType],
    more_facts: Mapping[str, Any],
    config: ModelConfig,
    idle_flops: float,
    open_base: Callable[[Path, torch.dtype], ModelType],
    export_whole: Callable[[ModelType, Tokenizer, Path, torch.dtype], None],
) -> Stage[ModelType]:
    check_fits(recipe.base, config, data, recipe.row_tokens)
    facts: dict[str, Any] = {
        "data_fingerprint": read_manifest(data)["fingerprint"],
        "base_fingerprint": fingerprint(recipe.base),
        **more_facts,
    }
    flops = config.flops_per_token(recipe.row_tokens) - idle_flops
    if recipe.lora is not None:  # without the gradients of the frozen weights, a third of all but attention
        flops -= (config.flops_per_token(0) - idle_flops) / 3

    def export(model: ModelType, folder: Path, dtype: torch.dtype) -> None:
        tokenizer = Tokenizer.load(data / "tokenizer")
        if recipe.lora is None:
            export_whole(model, tokenizer, folder, dtype)
        else:
            export_adapter(model, tokenizer, folder, dtype, recipe.base)

    return Stage(
        name=name,
        recipe=recipe,
        data=(data,),
        facts=facts | adapter_facts(recipe),
        build=lambda dtype: with_adapters(open_base(recipe.base, dtype), recipe),
        objective=objective,
        export=export,
        flops_per_token=flops,
        marker=marker(recipe),
    )


def with_adapters(model: ModelType, recipe: TuningRecipe) -> ModelType:
    """``model``, which was loaded from ``recipe.base``, with the recipe's adapters beside it if it asks for any."""
    lora = recipe.lora
    if lora is None:
        return model
    if lora.adapter is not None:
        load_adapter(model, lora.adapter, base=recipe.base)
    else:
        add_lora(model, adapter_shape(lora, recipe.base), seed=recipe.seed)
    return model


def adapter_shape(lora: Lora, base: Path) -> LoraShape:
    """The shape of the adapters that a recipe asks for, or of the one it goes on from."""
    if lora.adapter is not None:
        return read_adapter(lora.adapter, base=base)[0]
    return LoraShape(lora.rank, lora.alpha, lora.dropout, lora.targets)


def adapter_facts(recipe: TuningRecipe) -> dict[str, Any]:
    """What must be the same of an adapter to train on from. Raises :class:`ModelError` for one that is of no use."""
    if recipe.lora is None or recipe.lora.adapter is None:
        return {}
    read_adapter(recipe.lora.adapter, base=recipe.base)  # what is wrong with it is said before anything is begun
    return {"adapter_fingerprint": files.sha256_of_all(recipe.lora.adapter.glob("adapter_*"))}


def export_adapter(
    model: Decoder | RewardModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, base: Path
) -> None:
    """Write the folder of an adapter."""
    save_adapter(model, folder, base=base, dtype=dtype)
    tokenizer.save(folder)


def marker(recipe: TuningRecipe) -> str:
    """A file by which the folder that a stage writes is known."""
    return ADAPTER_CONFIG if recipe.lora is not None else "config.json"


def _open_decoder(base: Path, dtype: torch.dtype) -> Decoder:
    return load_model(base, dtype=dtype)


def _open_reward_model(base: Path, dtype: torch.dtype) -> RewardModel:
    if is_reward_model(base):
        return load_reward_model(base, dtype=dtype)
    return RewardModel.from_decoder(load_model(base, dtype=dtype))
