"""Adapter folders that the PEFT library opens, and that say which base they belong to.

``adapter_config.json`` and ``adapter_model.safetensors`` are as PEFT writes them. ``base.json`` is ours: the digest of
the base's weights, since an adapter over other weights computes without complaint and answers nonsense.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gale.core import files
from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.model.checkpoint import fingerprint, load_model, save_model
from gale.model.lora import ROUTER, LoraShape, adapted, add_lora, decoder_of, merge_lora
from gale.model.reward_model import RewardModel, is_reward_model, load_reward_model, save_reward_model
from gale.model.transformer import Decoder

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_BASE = "base.json"
_CARD = "README.md"
_PREFIX = "base_model.model."
_SCORE = f"{_PREFIX}score.weight"
# What else may stand in a model folder beside its weights; an adapter's own files go before its base's.
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def save_adapter(model: Decoder | RewardModel, folder: Path, *, base: Path, dtype: torch.dtype) -> None:
    """Write the adapters of ``model``, which stand over the model folder ``base``."""
    layers = adapted(model)
    first = next(iter(layers.values()))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}model.{name}.lora_A.weight"] = layer.lora_A.weight
        tensors[f"{_PREFIX}model.{name}.lora_B.weight"] = layer.lora_B.weight
    if isinstance(model, RewardModel):
        tensors[_SCORE] = model.score.weight
    content = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    files.write_bytes(folder / _WEIGHTS, save(content, metadata={"format": "pt"}))
    files.write_json(
        folder / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if isinstance(model, RewardModel) else "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": first.lora_A.out_features,
            "lora_alpha": first.scale * first.lora_A.out_features,
            "lora_dropout": first.dropout,
            "target_modules": _peft_targets(model),
            "modules_to_save": ["score"] if isinstance(model, RewardModel) else None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
    files.write_json(folder / _BASE, {"sha256": fingerprint(base)})


def read_adapter(folder: Path, *, base: Path | None) -> tuple[LoraShape, dict[str, Tensor]]:
    """Shape and weights of an adapter for ``base``, Gale's or PEFT's; None does not ask what it was made for.

    Raises :class:`ModelError` for another kind of adapter, for damage, and for an adapter of another base.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if not config:
        raise ModelError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}.")
    try:
        _refuse_other_kinds(folder, config)
    except TypeError as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} holds a value of the wrong kind: {error}") from error
    noted = None if base is None else read_json(folder / _BASE).get("sha256")
    if base is not None and noted is not None and noted != fingerprint(base):
        raise ModelError(
            f"The adapter {folder} was made for another base than {base}.",
            hint=f"It was trained over {config.get('base_model_name_or_path') or 'a model it does not name'}.",
        )
    try:
        tensors = load_file(folder / _WEIGHTS)
        shape = LoraShape(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=tuple(
                name.removeprefix(f"{_PREFIX}model.").removesuffix(".lora_A.weight")
                for name in tensors
                if name.endswith(".lora_A.weight")
            ),
        )
        # Before anything of that size is built.
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
        if not ranks <= {shape.rank} or not math.isfinite(shape.alpha) or not 0 <= shape.dropout < 1:
            raise ValueError(f"rank {shape.rank} (of its weights: {ranks}), alpha {shape.alpha}, {shape.dropout=}")
    except KeyError as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} lacks {error}.") from error
    except (SafetensorError, OSError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"The adapter {folder} is damaged: {error}", hint="Copy it again.") from error
    return shape, tensors


def read_adapter_layers(
    folder: Path, model: Decoder, *, base: Path | None, most_rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of each adapted layer of ``model``, which stays as it is, by the layer's name.

    The scale is in B; both are in the model's number format and on its device. Shapes are those that the model's
    configuration asks for: whatever computes in the place of a linear layer has them.
    Raises :class:`ModelError` as :func:`read_adapter` does, for ranks above ``most_rank``, for the adapter of a reward
    model, and where names or shapes do not fit the model.
    """
    shape, tensors = read_adapter(folder, base=base)
    if _SCORE in tensors:
        raise ModelError(f"The adapter {folder} makes a reward model of its base, which scores texts and writes none.")
    if not 1 <= shape.rank <= most_rank:
        raise ModelError(f"The adapter {folder} has rank {shape.rank}; at most {most_rank} is served.")
    like = model.embed_tokens.weight
    with torch.device("meta"):
        linears = {
            name: each for name, each in Decoder(model.config).named_modules() if isinstance(each, torch.nn.Linear)
        }
    there = {name for name, _ in model.named_modules()}
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for name in shape.targets:
        linear = linears.get(name)
        if linear is None or name not in there or not name.startswith("layers.") or name.endswith(ROUTER):
            raise ModelError(
                f"The adapter {folder} was made for another base: the model has no linear layer {name} to adapt."
            )
        pair: list[Tensor] = []
        for part, wanted in (("A", [shape.rank, linear.in_features]), ("B", [linear.out_features, shape.rank])):
            weight = tensors.pop(full := f"{_PREFIX}model.{name}.lora_{part}.weight", None)
            if weight is None or list(weight.shape) != wanted:
                found = "is missing" if weight is None else f"has shape {list(weight.shape)}"
                raise ModelError(
                    f"The adapter {folder} was made for another base: its {full} {found}, "
                    f"where the model needs {wanted}."
                )
            pair.append(weight.float() * (shape.alpha / shape.rank) if part == "B" else weight)
        layers[name] = (pair[0].to(like), pair[1].to(like))
    if tensors:
        raise ModelError(f"The adapter {folder} holds, without a place for it in the model, the weight {min(tensors)}.")
    return layers


def load_adapter(model: Decoder | RewardModel, folder: Path, *, base: Path) -> None:
    """Put the adapters of ``folder`` over ``model``, which was loaded from ``base``, ready to be trained on.

    Raises :class:`ModelError` as :func:`read_adapter` does, and where names or shapes do not fit the model.
    """
    shape, tensors = read_adapter(folder, base=base)
    add_lora(model, shape, seed=0)
    wanted: dict[str, Tensor] = {}
    for name, layer in adapted(model).items():
        wanted[f"{_PREFIX}model.{name}.lora_A.weight"] = layer.lora_A.weight
        wanted[f"{_PREFIX}model.{name}.lora_B.weight"] = layer.lora_B.weight
    if isinstance(model, RewardModel):
        wanted[_SCORE] = model.score.weight
    if unlike := sorted(wanted.keys() ^ tensors.keys()):
        state = "lacks" if unlike[0] in wanted else "holds, without a place for it in the model,"
        raise ModelError(f"The adapter {folder} {state} the weight {unlike[0]}.")
    for name, weight in wanted.items():
        if weight.shape != tensors[name].shape:
            raise ModelError(
                f"The adapter {folder} was made for another base: its {name} has shape {list(tensors[name].shape)}, "
                f"where {base} needs {list(weight.shape)}."
            )
        with torch.no_grad():
            weight.copy_(tensors[name])


def open_with_adapter(base: Path, adapter: Path, *, dtype: torch.dtype) -> Decoder | RewardModel:
    """The model of ``base`` under ``adapter``: a reward model where the adapter carries a score. Trainable."""
    scores = read_json(adapter / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    model: Decoder | RewardModel
    if scores and is_reward_model(base):
        model = load_reward_model(base, dtype=dtype)
    else:
        decoder = load_model(base, dtype=dtype)
        model = RewardModel.from_decoder(decoder) if scores else decoder
    load_adapter(model, adapter, base=base)
    return model


def merge_adapter(adapter: Path, base: Path, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model folder ``out`` that answers as ``base`` under ``adapter`` does. Sums are made in fp32.

    The base's README.md goes along, so that its licence stays known.
    Raises :class:`ModelError` as :func:`load_adapter` does, and :class:`gale.core.errors.GaleError` where ``out`` is
    something else.
    """
    files.refuse_to_replace(out, base, adapter)
    model = open_with_adapter(base, adapter, dtype=torch.float32)
    merge_lora(model)
    with files.new_directory(out, marker="config.json") as folder:
        if isinstance(model, RewardModel):
            settings = {**read_json(base / "generation_config.json"), **read_json(base / "config.json")}
            save_reward_model(model, folder, dtype=dtype, pad_token_id=settings.get("pad_token_id"))
        else:
            save_model(model, folder, dtype=dtype)
        for name in _COMPANIONS:
            source = next((path / name for path in (adapter, base) if (path / name).is_file()), None)
            if source is not None:
                shutil.copyfile(source, folder / name)
        _copy_card(base, folder, adapter)


def _copy_card(base: Path, out: Path, adapter: Path) -> None:
    """The base's README.md, in whose head its licence stands, with a line that says what the folder is."""
    if (base / _CARD).is_file():
        card = (base / _CARD).read_bytes().rstrip()
        name = " ".join(adapter.resolve().name.split())
        files.write_bytes(out / _CARD, card + f"\n\nThe adapter {name} was merged into these weights.\n".encode())


def _peft_targets(model: Decoder | RewardModel) -> list[str]:
    """The adapted layers as PEFT names them: the last parts of their names, where all layers of such a name are."""
    names = set(adapted(model))
    short = {name.rpartition(".")[2] for name in names}
    everywhere = {
        name
        for name, module in decoder_of(model).named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in short
    }
    return sorted(short if everywhere == names else names)


def _refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    plain = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    plain |= {"alora_invocation_tokens": []}
    unlike = [key for key, value in plain.items() if (config.get(key) or value) != value]
    if config.get("peft_type") != "LORA":
        unlike = [f"peft_type {config.get('peft_type')}"]
    if set(config.get("modules_to_save") or ()) - {"score"}:
        unlike.append("modules_to_save")
    if unlike:
        raise ModelError(
            f"Gale cannot open the adapter {folder}: {', '.join(unlike)} is not supported, only plain LoRA is."
        )
