"""What stands in a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The header is read here, since a file may come from anywhere and claim anything; how numbers are packed is the ``gguf``
library's to know.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as ValueType

from gale.core.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_SCALARS = {
    ValueType.UINT8: "u1",
    ValueType.INT8: "i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
    ValueType.BOOL: "?",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A packed tensor; ``shape`` is in the order of torch, slowest dimension first."""

    kind: Kind
    shape: list[int]
    packed: np.ndarray

    def numbers(self, expert: int | None = None) -> np.ndarray:
        """Its numbers in fp32, or those of one slice along the first dimension. Raises :class:`NotImplementedError`."""
        packed = self.packed if expert is None else self.packed[expert]
        shape = self.shape if expert is None else self.shape[1:]
        numbers: np.ndarray = gguf.dequantize(packed, self.kind)
        return numbers.reshape(shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Settings and tensors by name. The tensors are views of the file, which is mapped into memory."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Raises :class:`ModelError` for what is no GGUF file, or not the whole of one."""
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            fields, tensors = _read(data)
        except (OSError, ValueError, KeyError, OverflowError, struct.error) as error:
            hint = "Copy or download the file again."
            raise ModelError(f"{path} is no GGUF file, or damaged, or cut short: {error}.", hint=hint) from error
        return cls(path, fields, tensors)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends within its header, after {len(self.data)} bytes")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: ValueType) -> Any:
        if kind == ValueType.STRING:
            return self.text()
        if kind != ValueType.ARRAY:
            return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()
        inner, count = ValueType(self.number("<I")), self.number("<Q")
        if inner == ValueType.STRING:
            return [self.text() for _ in range(count)]
        scalar = np.dtype(_SCALARS[inner])  # arrays of arrays are in no file of a model
        return np.frombuffer(self.take(count * scalar.itemsize), scalar).tolist()


def _read(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("<I")) not in _VERSIONS:
        raise ValueError(f"its version is {version}, and {_VERSIONS} can be read")
    tensors, values = cursor.number("<Q"), cursor.number("<Q")
    fields: dict[str, Any] = {}
    for _ in range(values):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"it names {name} twice")
        fields[name] = cursor.value(ValueType(cursor.number("<I")))
    heads: dict[str, tuple[Kind, list[int], int]] = {}
    for _ in range(tensors):
        name = cursor.text()
        if (dimensions := cursor.number("<I")) > _MOST_DIMENSIONS or name in heads:
            raise ValueError(f"tensor {name} is there twice, or has {dimensions} dimensions")
        shape = [cursor.number("<Q") for _ in range(dimensions)][::-1]
        heads[name] = Kind(cursor.number("<I")), shape, cursor.number("<Q")
    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its tensors are aligned to {alignment}")
    start = end = cursor.at + -cursor.at % alignment
    found: dict[str, GgufTensor] = {}
    for name, (kind, shape, offset) in sorted(heads.items(), key=lambda item: item[1][2]):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row = shape[-1] if shape else 1
        if row % block:
            raise ValueError(f"tensor {name} has rows of {row} numbers, which {kind.name} cannot pack")
        packed_shape = [*shape[:-1], row // block * block_bytes]
        begin, size = start + offset, math.prod(packed_shape)
        if begin < end or begin + size > len(data):
            raise ValueError(f"tensor {name} {'overlaps another' if begin < end else 'ends beyond the file'}")
        end = begin + size
        packed = np.frombuffer(data, np.uint8, size, begin).reshape(packed_shape)
        found[name] = GgufTensor(kind, shape, packed)
    return fields, found
