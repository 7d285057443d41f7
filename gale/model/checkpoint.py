"""Model folders in Hugging Face layout: reading with every fault named, writing so that transformers opens them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gale.core import files
from gale.core.errors import ModelError
from gale.core.model_folder import read_json
from gale.model.config import ModelConfig
from gale.model.experts import ExpertWeights
from gale.model.safetensors_file import MappedFile, forget, read_header, write
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What stands before our names: in models of text, and in those of text and images as older and newer folders have it.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_OF_IMAGES = ("vision_tower.", "multi_modal_projector.")
# A part of ours as a view and, where it is a whole parameter, the name of that.
_Place = tuple[Tensor, str | None]


class _Whole(NamedTuple):
    name: str
    others: tuple[str, ...]


# Matrices that are stored as one: by the first of ours, the name of the whole and the others; by those, None.
_FUSED: dict[str, dict[str, _Whole | None]] = {
    "phi3": {
        "q_proj.weight": _Whole("qkv_proj.weight", ("k_proj.weight", "v_proj.weight")),
        "k_proj.weight": None,
        "v_proj.weight": None,
        "gate_proj.weight": _Whole("gate_up_proj.weight", ("up_proj.weight",)),
        "up_proj.weight": None,
    }
}


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | None = None) -> Decoder:
    """The decoder of a model folder, in evaluation mode. Raises :class:`ModelError`.

    Nothing is built before names and shapes of the stored weights have been compared with the configuration, which
    may ask for anything. On a CPU, weights that are stored in ``dtype`` are not read but mapped into memory
    (:class:`gale.model.safetensors_file.MappedFile`): they may be trained, and the file stays as it is. All others are
    converted one tensor at a time, so no more than one is ever held twice.
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
    with assembling(config, dtype=dtype, device=device) as (model, take):
        for path in weight_files(folder):
            mapped = MappedFile(path)
            for name, stored in _names(mapped.header, config):
                weight = mapped.tensor(stored)
                if name in beside:
                    with torch.no_grad():
                        beside[name].copy_(weight)
                elif kept := take(name, weight):
                    model.mapped_bytes += kept
                else:
                    forget(weight)
    return model.eval()


@contextlib.contextmanager
def assembling(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None = None
) -> Iterator[tuple[Decoder, Callable[[str, Tensor], int]]]:
    """A decoder without weights, and the function that takes them in, by the names of :func:`stored_weights`.

    What has the wanted number format and device becomes a parameter as it is, without a copy; the function says how
    many bytes of it did. Otherwise, and for experts, which are stacked, it is copied.
    """
    device = device or torch.device("cpu")
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    for module in model.modules():
        if isinstance(module, ExpertWeights):
            # As to_empty does, which loads torch's compiler for it.
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=device)))
    places = dict(_places(model))

    def take(name: str, weight: Tensor) -> int:
        kept = 0
        parts = places.pop(name)
        for part, place in zip(weight.split([len(part) for part, _ in parts]), parts, strict=True):
            here, parameter = place
            if parameter is None:
                with torch.no_grad():
                    here.copy_(part)
                continue
            module, _, leaf = parameter.rpartition(".")
            ours = part.to(device, dtype)
            kept += ours.nbytes if ours.data_ptr() == part.data_ptr() else 0
            setattr(model.get_submodule(module), leaf, nn.Parameter(ours))
        return kept

    yield model, take
    assert not places, "every weight was taken in"
    model.retie()


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
    weights = itertools.chain(full_names(stored_weights(model)), (beside or {}).items())
    shapes = {name: (dtype, list(weight.shape)) for name, weight in weights}
    weights = itertools.chain(full_names(stored_weights(model)), (beside or {}).items())
    write(folder / WEIGHTS, shapes, ((name, weight.detach().to("cpu", dtype)) for name, weight in weights))
    files.write_json(folder / "config.json", {**model.config.to_hugging_face(dtype=_NAMES[dtype]), **(settings or {})})


def full_names(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The names of :func:`stored_weights` as they stand in a file."""
    for name, weight in weights:
        yield name if name.startswith("lm_head.") else f"model.{name}", weight


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model folder, which must not know more tokens than its model. Raises :class:`ModelError`."""
    tokenizer = Tokenizer.load(folder)
    known = max(tokenizer.vocabulary.values(), default=-1) + 1
    if known > config.vocabulary_size:
        raise ModelError(
            f"{folder}: the tokenizer knows {known} tokens, the model only {config.vocabulary_size}.",
            hint="Take tokenizer.json from the same place as the weights.",
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
    found = {tensor.dtype for path in weight_files(folder) for tensor in read_header(path).values()}
    return found.pop() if len(found) == 1 and found <= _NAMES.keys() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """How ``config.json`` calls a number format that Gale writes."""
    return _NAMES[dtype]


def stored_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight as Hugging Face stores it, by its name there without ``model.``.

    A tied parameter comes once, under its first name. Stacked experts come one by one, as views; what Phi-3 stores as
    one matrix is put together.
    """
    for name, parts in _places(model):
        yield name, parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts])


def _places(model: Decoder) -> Iterator[tuple[str, list[_Place]]]:
    """What :func:`stored_weights` names, as those parts of ours that it consists of, one below the other."""
    fused = _FUSED.get(model.config.family, {})
    for name, parameter in model.named_parameters():
        stack, _, kind = name.rpartition(".")
        _, _, own = name.partition(".self_attn." if ".self_attn." in name else ".mlp.")
        if stack.endswith("mlp.experts"):
            for expert, weight in enumerate(parameter):
                if kind == "gate_up_proj":
                    gate_IC, up_IC = weight.chunk(2)
                    yield f"{stack}.{expert}.gate_proj.weight", [(gate_IC, None)]
                    yield f"{stack}.{expert}.up_proj.weight", [(up_IC, None)]
                else:
                    yield f"{stack}.{expert}.{kind}.weight", [(weight, None)]
        elif own not in fused:
            yield name, [(parameter, name)]
        elif whole := fused[own]:
            names = [name.removesuffix(own) + part for part in (own, *whole.others)]
            yield name.removesuffix(own) + whole.name, [(model.get_parameter(part), part) for part in names]


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


def _names(stored: Iterable[str], config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Our name and the stored name of each weight of a file that is ours to read."""
    for whole in stored:
        name = next((whole.removeprefix(prefix) for prefix in _PREFIXES if whole.startswith(prefix)), whole)
        if config.family == "gemma3_text" and name.startswith(_OF_IMAGES):
            continue
        if name == "lm_head.weight" and config.tied_embeddings:
            continue  # some folders store the tied head a second time
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old Llama folders store the rotary table, which follows from the configuration
        yield name, whole


def _stored_shapes(paths: list[Path], config: ModelConfig) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in paths:
        header = read_header(path)
        for name, stored in _names(header, config):
            tensor = header[stored]
            if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
                raise ModelError(
                    f"{path}: weight {name} holds {tensor.dtype} numbers.", hint="Use the model's bf16 checkpoint."
                )
            if name in shapes:
                raise ModelError(f"{path} holds another weight {name} beside the one before it.")
            shapes[name] = tensor.shape
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
    for name, shape in sorted(stored.items()):
        if name not in wanted:
            raise ModelError(f"{folder} holds a weight that its config.json has no place for: {name}.")
        if shape != wanted[name]:
            raise ModelError(f"{folder}: weight {name} has shape {shape}, but config.json asks for {wanted[name]}.")
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ModelError(f"{folder} lacks {len(missing)} weights, the first being {missing[0]}.")
