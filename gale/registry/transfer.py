"""Model folders in and out: into ``GALE_HOME/models`` under a name, and out of it to any place."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from gale.core import files
from gale.core.errors import GaleError, ModelError
from gale.core.model_folder import model_name, read_json
from gale.core.settings import settings
from gale.model.checkpoint import check_weights, load_model, load_tokenizer, save_model, stored_dtype, weight_files
from gale.model.config import ModelConfig
from gale.model.gguf_import import convert_gguf
from gale.registry.models import BUILTIN

CHECKSUMS = "SHA256SUMS"
# The same weights once more, in formats that Gale does not read: they would double the size of a copy for nothing.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")


def model_files(folder: Path) -> list[Path]:
    """The files that make up a model: its weights, and whatever stands beside them in the folder itself."""
    weights = weight_files(folder)
    others = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in _OTHER_WEIGHTS
        and file.name != CHECKSUMS
    ]
    return [*others, *weights]


def import_model(source: Path, name: str | None = None, *, link: bool = False) -> Path:
    """Take a model folder into ``GALE_HOME/models`` as ``name``, by copying or by linking to its files.

    Before, configuration, shapes of the weights and tokenizer are checked; SHA-256 sums of all files are written
    beside them. A GGUF file becomes a folder. Raises :class:`ModelError` for what cannot be opened, and for a name that
    is taken or is none.
    """
    source = files.resolve(source)
    packed = source.is_file()
    if packed and link:
        raise ModelError("A GGUF file is unpacked, so there is nothing to link to.", hint="Leave --link out.")
    if not packed:
        config = ModelConfig.load(source)
        check_weights(source, config)
        load_tokenizer(source, config)
    name = name or (source.stem if packed else model_name(source))
    if Path(name).name != name or name.startswith(".") or name == BUILTIN.name:
        raise ModelError(f"{name!r} cannot be the name of a model.", hint="Give --name a plain word.")
    target = settings().home / "models" / name
    if target.exists() or target.is_symlink():
        raise ModelError(
            f"There is a model {name} already.", hint=f"Give another with --name, or remove {target} first."
        )
    with files.new_directory(target) as folder:
        if packed:
            convert_gguf(source, folder)
        for file in () if packed else model_files(source):
            if link:
                (folder / file.name).symlink_to(file)
            else:
                shutil.copyfile(file, folder / file.name)
        sums = [f"{files.sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
        (folder / CHECKSUMS).write_text("".join(sums), encoding="utf-8")
    return target


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by name, as written down when the model was imported; empty where it was not."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        rows = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: digest for digest, name in rows}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def changed_files(folder: Path) -> list[str]:
    """Names of files that are no longer what they were when the model was imported."""
    return [
        name
        for name, digest in checksums(folder).items()
        if not (folder / name).is_file() or files.sha256(folder / name) != digest
    ]


def export_folder(folder: Path, out: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the model as a Hugging Face folder ``out``: a copy, or with its weights in another number format.

    Raises :class:`ModelError` for a folder that cannot be opened, :class:`GaleError` where ``out`` is something else.
    """
    config = ModelConfig.load(folder)
    check_weights(folder, config)
    files.refuse_to_replace(out, folder)
    if out.exists() and not out.is_dir():
        raise GaleError(f"{out} is something else and is not replaced.", hint="Choose another --out.")
    convert = dtype is not None and dtype != stored_dtype(folder)
    weights = {file.name for file in weight_files(folder)} | {"model.safetensors.index.json"}
    with files.new_directory(out, marker="config.json") as target:
        for file in model_files(folder):
            if not (convert and file.name in weights):
                shutil.copyfile(file, target / file.name)
        if convert and dtype is not None:
            model = load_model(folder, dtype=dtype)
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise ModelError(f"{folder} holds values too large for this number format.", hint="Use --dtype bf16.")
            save_model(model, target, dtype=dtype)
            # What Gale does not know of a configuration is kept.
            files.write_json(
                target / "config.json", read_json(folder / "config.json") | read_json(target / "config.json")
            )
