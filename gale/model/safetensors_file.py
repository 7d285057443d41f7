"""safetensors files, mapped into memory rather than read: https://github.com/huggingface/safetensors#format

Eight bytes tell the length of a JSON header, which tells each tensor's format, shape and place in the rest. Everything
is checked before a tensor is given out: a header that does not describe exactly the bytes that are there is refused.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gale.core import files
from gale.core.errors import ModelError

_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_ALIGNMENT = 64  # of the first tensor in files that we write: a line of the processor's cache
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Where the mappings of :class:`MappedFile` begin that some tensor still needs.
_mappings: WeakKeyDictionary[mmap.mmap, int] = WeakKeyDictionary()


class StoredTensor(NamedTuple):
    """Where a tensor stands in its file: ``begin`` and ``end`` are bytes from the file's beginning."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by name. Raises :class:`ModelError` for a header that is not true of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes, of {size} in all")
            content = json.loads(file.read(length), object_pairs_hook=_without_repetition)
        if not isinstance(content, dict):
            raise ValueError("its header is no JSON object")
        content.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, 8 + length) for name, entry in content.items()}
        at = 8 + length
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
            if tensor.begin != at:
                raise ValueError(f"tensor {name} {'overlaps another' if tensor.begin < at else 'follows a gap'}")
            at = tensor.end
        if at != size:
            raise ValueError(f"its header describes {at} bytes, but it has {size}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is damaged or cut short: {error}.", hint="Copy or download the file again."
        ) from error
    return tensors


class MappedFile:
    """The tensors of a file as views of it: no copy is made, and the system reads what is looked at.

    They may be written to: what is written becomes private memory, and the file stays as it is. They keep the mapping,
    and with it the file's content, even where another file is put in its place; rewriting the file itself would show.
    """

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        try:
            with path.open("rb") as file:
                self._mapping = mmap.mmap(
                    file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be mapped into memory: {error}") from error
        _mappings[self._mapping] = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        dtype, shape, begin, _ = self.header[name]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._mapping, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)


def forget(tensor: Tensor) -> bool:
    """Give back the memory of a tensor of a :class:`MappedFile` that is not needed now; what was written to it is lost.

    It may still be looked at, and is then read again. Nothing happens to other tensors; says whether it is one.
    """
    for mapping, address in list(_mappings.items()):
        begin = tensor.data_ptr() - address
        if 0 <= begin < len(mapping):
            # Whole pages only: of what shares one with its neighbours nothing may be lost.
            first, end = -(-begin // mmap.PAGESIZE), (begin + tensor.nbytes) // mmap.PAGESIZE
            if end > first and hasattr(mmap, "MADV_DONTNEED"):  # not on macOS before Python 3.13
                mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)
            return True
    return False


def write(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, list[int]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Atomically write a file, one tensor at a time: ``tensors`` are those of ``shapes``, in the same order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    with files.new_file(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for (name, (dtype, shape)), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert given == name and tensor.dtype == dtype and list(tensor.shape) == shape, "as announced"
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _stored(name: str, entry: Any, data: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"its header does not say what and where tensor {name} is")
    if dtype not in _DTYPES:
        raise ValueError(f"tensor {name} has the unknown number format {dtype}")
    if not all(isinstance(size, int) and size >= 0 for size in shape) or not 0 <= begin <= end:
        raise ValueError(f"tensor {name} has an impossible shape or place")
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name} of {dtype} and shape {shape} cannot have {end - begin} bytes")
    return StoredTensor(_DTYPES[dtype], shape, data + begin, data + end)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("its header names something twice")
    return content
