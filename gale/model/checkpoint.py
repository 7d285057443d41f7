"""Model folders in Hugging Face layout: reading with every fault named, writing so that transformers opens them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gale.core import files
from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.model.config import ModelConfig
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | None = None) -> Decoder:
    """The decoder of a model folder, in evaluation mode. Raises :class:`ModelError`.

    Nothing is built before names and shapes of the stored weights have been compared with the configuration, which
    may ask for anything. Weights are converted one tensor at a time, so no more than one is ever held twice.
    """
    return load_decoder(folder, ModelConfig.load(folder), dtype=dtype, device=device)


def load_decoder(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Decoder:
    """As :func:`load_model` with a configuration that is known already.

    ``beside`` are further weights that the folder must hold, by the name under which it does; they are filled.
    """
    beside = beside or {}
    check_weights(folder, config, beside)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device or torch.device("cpu"))
    # Built on the meta device, the tie and the rotary table were left without content.
    model.retie()
    wanted = dict(stored_weights(model))
    for path in weight_files(folder):
        with _opened(path) as weights:
            for name, stored in _names(weights, config):
                with torch.no_grad():
                    (beside[name] if name in beside else wanted[name]).copy_(weights.get_tensor(stored))
    return model.eval()


def save_model(
    model: Decoder,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    beside: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors``; a tied head is stored once, as Hugging Face does.

    ``beside`` are weights outside the decoder by name, ``settings`` what ``config.json`` says further or otherwise.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in stored_weights(model):
        full = name if name.startswith("lm_head.") else f"model.{name}"
        tensors[full] = weight.detach().to("cpu", dtype).contiguous()
    tensors |= {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in (beside or {}).items()}
    files.write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    files.write_json(folder / "config.json", {**model.config.to_hugging_face(dtype=_NAMES[dtype]), **(settings or {})})


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model folder, which must not know more tokens than its model. Raises :class:`ModelError`."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise ModelError(
            f"{folder}: the tokenizer knows {tokenizer.vocabulary_size} tokens, "
            f"the model only {config.vocabulary_size}."
        )
    return tokenizer


def check_weights(
    folder: Path, config: ModelConfig, beside: Mapping[str, Tensor] | None = None
) -> dict[str, list[int]]:
    """Shapes of the decoder's stored weights by name, which must be those that ``config`` asks for.

    So must be those ``beside`` it. Reads the heads of the files only. Raises :class:`ModelError`.
    """
    shapes = _stored_shapes(weight_files(folder), config)
    for name, weight in (beside or {}).items():
        if (shape := shapes.pop(name, None)) != list(weight.shape):
            raise ModelError(f"{folder} must hold a weight {name} of shape {list(weight.shape)}, but holds {shape}.")
    _check_shapes(folder, config, shapes)
    return shapes


def stored_dtype(folder: Path) -> torch.dtype:
    """The number format in which weights are stored; fp32 where they differ or it is one Gale does not write."""
    found = set()
    for path in weight_files(folder):
        with _opened(path) as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16}
    return kinds.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def stored_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight as Hugging Face stores it: its name there, without ``model.``, and the part of ours that holds it.

    A tied parameter comes once, under its first name. Stacked experts come one by one, as views.
    """
    for name, parameter in model.named_parameters():
        stack, _, kind = name.rpartition(".")
        if not stack.endswith("mlp.experts"):
            yield name, parameter
            continue
        for expert, weight in enumerate(parameter):
            if kind == "gate_up_proj":
                gate_IC, up_IC = weight.chunk(2)
                yield f"{stack}.{expert}.gate_proj.weight", gate_IC
                yield f"{stack}.{expert}.up_proj.weight", up_IC
            else:
                yield f"{stack}.{expert}.{kind}.weight", weight


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder, one or several. Raises :class:`ModelError`."""
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{folder / _INDEX} has no weight map.")
        paths = [folder / Path(name).name for name in sorted(set(names.values()))]
    else:
        paths = [folder / WEIGHTS]
    if missing := [path.name for path in paths if not path.is_file()]:
        hint = "Gale reads safetensors only; convert .bin or .pt weights with transformers first."
        raise ModelError(f"{folder} lacks its weights: {', '.join(missing)}.", hint=hint)
    return paths


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights of a model folder: by what it is known where adapters and resumed runs come back to it.

    Raises :class:`ModelError` where it has none.
    """
    return files.sha256_of_all(weight_files(folder))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {error}", hint="Copy or download the file again.") from error


def _names(weights: Any, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Our name and the stored name of each weight of a file that is ours to read."""
    for stored in weights.keys():  # noqa: SIM118 (the library's handle is no dictionary)
        name = stored.removeprefix("model.")
        if name == "lm_head.weight" and config.tied_embeddings:
            continue  # some folders store the tied head a second time
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old Llama folders store the rotary table, which follows from the configuration
        yield name, stored


def _stored_shapes(paths: list[Path], config: ModelConfig) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in paths:
        with _opened(path) as weights:
            for name, stored in _names(weights, config):
                shape = list(weights.get_slice(stored).get_shape())
                if shapes.setdefault(name, shape) != shape:
                    raise ModelError(f"{path} holds another weight {name} than the one before it.")
    return shapes


def _check_shapes(folder: Path, config: ModelConfig, stored: dict[str, list[int]]) -> None:
    layers = len({name.split(".")[1] for name in stored if name.startswith("layers.")})
    if config.layers > layers:
        raise ModelError(f"{folder} holds {layers} layers, but config.json asks for {config.layers}.")
    kinds = [config.has_experts(layer) for layer in range(config.layers)]
    experts = len({name.partition(".mlp.experts.")[2].partition(".")[0] for name in stored if ".mlp.experts." in name})
    if config.experts is not None and any(kinds) and config.experts.count > experts:
        raise ModelError(f"{folder} holds {experts} experts, but config.json asks for {config.experts.count}.")
    wanted: dict[str, list[int]] = {}
    for kind in set(kinds):  # one layer with experts and one without tell the shapes of all
        one_layer = replace(config, layers=1)
        if config.experts is not None:
            one_layer = replace(one_layer, experts=replace(config.experts, every=1, dense_layers=() if kind else (0,)))
        try:
            with torch.device("meta"):
                model = Decoder(one_layer)
        except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
            raise ModelError(f"{folder}: config.json asks for sizes that no computer holds.") from error
        of_kind = [layer for layer in range(config.layers) if kinds[layer] == kind]
        for name, weight in stored_weights(model):
            for layer in of_kind if name.startswith("layers.") else [0]:
                wanted[name.replace("layers.0.", f"layers.{layer}.")] = list(weight.shape)
    for name, shape in stored.items():
        if name not in wanted:
            raise ModelError(f"{folder} holds a weight that its config.json has no place for: {name}.")
        if shape != wanted[name]:
            raise ModelError(f"{folder}: weight {name} has shape {shape}, but config.json asks for {wanted[name]}.")
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ModelError(f"{folder} lacks {len(missing)} weights, the first being {missing[0]}.")
