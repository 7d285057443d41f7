"""Model folders in Hugging Face layout: reading with every fault named, writing so that transformers opens them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gale.core import files
from gale.core.errors import ModelError
from gale.model.config import ModelConfig
from gale.model.transformer import Decoder

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | None = None) -> Decoder:
    """The decoder of a model folder, in evaluation mode. Raises :class:`ModelError`.

    Weights are converted one tensor at a time, so no more than one is ever held twice.
    """
    config = ModelConfig.load(folder)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device or torch.device("cpu"))
    # Built on the meta device, the tie and the rotary table were left without content.
    model.retie()
    wanted = dict(model.named_parameters())
    found: set[str] = set()
    for name, tensor in _tensors(folder):
        name = name.removeprefix("model.")
        if name == "lm_head.weight" and config.tied_embeddings:
            continue  # some folders store the tied head a second time
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old Llama folders store the rotary table, which follows from the configuration
        if name not in wanted:
            raise ModelError(f"{folder} holds a weight that its config.json has no place for: {name}.")
        if wanted[name].shape != tensor.shape:
            raise ModelError(
                f"{folder}: weight {name} has shape {list(tensor.shape)}, "
                f"but config.json asks for {list(wanted[name].shape)}."
            )
        with torch.no_grad():
            wanted[name].copy_(tensor)
        found.add(name)
    if missing := sorted(wanted.keys() - found):
        raise ModelError(f"{folder} lacks {len(missing)} weights, the first being {missing[0]}.")
    return model.eval()


def save_model(model: Decoder, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``model.safetensors``; a tied head is stored once, as Hugging Face does."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # names a tied parameter once, under its first name
        full = name if name.startswith("lm_head.") else f"model.{name}"
        tensors[full] = parameter.detach().to("cpu", dtype).contiguous()
    files.write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    files.write_json(folder / "config.json", model.config.to_hugging_face(dtype=_NAMES[dtype]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that may be absent (then empty). Raises :class:`ModelError`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (the library's handle is no dictionary)
                    yield name, weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged or cut short: {error}", hint="Copy or download the file again."
            ) from error


def _weight_files(folder: Path) -> list[Path]:
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
