"""Checkpoints of a run: atomic folders from which training goes on bit for bit.

``checkpoints/step-00000200/`` holds ``state.safetensors`` (fp32 weights, optimiser moments, random state) and
``state.json`` (step, recipe, data fingerprint, number format, machine). A folder appears under its name only when it
is whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gale.core import files
from gale.core.errors import CheckpointError
from gale.core.progress import console


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], machine: dict[str, Any], *, keep: int
) -> None:
    """Write the checkpoint of ``step`` and remove all but the ``keep`` newest."""
    folder = _folder(run, step)
    with files.new_directory(folder) as temporary:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file({**content, "torch_rng": torch.get_rng_state()}, temporary / "state.safetensors")
        except SafetensorError as error:  # what the library makes of a full disk
            raise CheckpointError(
                f"The checkpoint {folder} cannot be written: {error}", hint="Free some space and go on with --resume."
            ) from error
        weights_digest = files.sha256(temporary / "state.safetensors")
        about = {"step": step, "sha256": weights_digest, "machine": machine}
        files.write_json(temporary / "state.json", {**about, **facts})
    for old in _folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    run: Path, facts: dict[str, Any], machine: dict[str, Any], *, silent: bool = False
) -> tuple[int, dict[str, Tensor]] | None:
    """Step and tensors of the newest whole checkpoint, None where there is none yet.

    A damaged one is passed over, aloud unless ``silent``, as all processes but one are; another machine is named, since
    its sums may round otherwise. Raises
    :class:`CheckpointError` where the checkpoint belongs to another recipe, other data or another number format, with
    what differs, and where all are damaged.
    """
    damaged = False
    for folder in reversed(_folders(run)):
        try:
            saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if files.sha256(folder / "state.safetensors") != saved["sha256"]:
                raise ValueError("its checksum is wrong")
            tensors = load_file(folder / "state.safetensors")
            step = int(saved["step"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if not silent:
                _warn(f"Checkpoint {folder.name} is damaged ({error}); trying the one before.")
            damaged = True
            continue
        if differences := _differences(saved, facts):
            raise CheckpointError(
                "\n".join([f"The run in {run} was started differently:", *differences]),
                hint="Resume with what it was started with, or start anew with another --out.",
            )
        if (changes := _differences(saved, {"machine": machine})) and not silent:
            _warn("\n".join(["From here the curve may differ in the last bits, since the machine does:", *changes]))
        torch.set_rng_state(tensors.pop("torch_rng"))
        return step, tensors
    if damaged:
        raise CheckpointError(f"All checkpoints in {run} are damaged.", hint="Start anew with another --out.")
    return None


def _differences(saved: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    # What an older Gale did not write down is unknown, not different.
    known = facts.keys() & saved.keys()
    old, new = (_flatten({key: source[key] for key in known}) for source in (saved, facts))
    return [
        f"  - {key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _warn(text: str) -> None:
    console.print(text, style="yellow", markup=False, soft_wrap=True)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))
