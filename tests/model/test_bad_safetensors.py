"""A damaged weight file is refused with what is wrong with it, wherever the damage is; its end is never read beyond."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gale.core.errors import ModelError
from gale.model.checkpoint import load_model, save_model
from gale.model.safetensors_file import MappedFile, read_header, write
from gale.model.transformer import Decoder

Header = dict[str, Any]


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    save_model(model, tmp_path, dtype=torch.float32)
    return tmp_path


def rewrite(path: Path, change: Callable[[Header], Any]) -> None:
    """Another header before the same data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


NORM = "model.norm.weight"


def shift(header: Header) -> None:
    """The first two tensors, one over the other."""
    first, second = sorted(
        (entry for name, entry in header.items() if name[0] != "_"), key=lambda e: e["data_offsets"]
    )[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "offsets beyond the file": (lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 192]), "follows a gap"),
    "offsets that overlap": (shift, "overlaps another"),
    "a tensor left out": (lambda h: h.pop(NORM), "follows a gap|describes"),
    "offsets backwards": (lambda h: h[NORM].update(data_offsets=[192, 0]), "impossible shape or place"),
    "negative offsets": (lambda h: h[NORM].update(data_offsets=[-192, 0]), "impossible shape or place"),
    "a negative size": (lambda h: h[NORM].update(shape=[-48]), "impossible shape or place"),
    "a size that is no number": (lambda h: h[NORM].update(shape=["48"]), "impossible shape or place"),
    "a shape of more numbers": (lambda h: h[NORM].update(shape=[10**12]), "cannot have 192 bytes"),
    "a format of other width": (lambda h: h[NORM].update(dtype="F64"), "cannot have 192 bytes"),
    "an unknown format": (lambda h: h[NORM].update(dtype="F33"), "unknown number format F33"),
    "no numbers at all": (lambda h: h[NORM].update(dtype="I32"), "torch.int32 numbers"),
    "no offsets": (lambda h: h[NORM].pop("data_offsets"), "what and where tensor model.norm.weight is"),
    "no entry": (lambda h: h.update({NORM: None}), "what and where tensor model.norm.weight is"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_is_not_true_is_refused(folder: Path, fault: str) -> None:
    change, said = HEADERS[fault]
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=said):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "claims 0 bytes, of 0"),
        (b"\x01\x02\x03", "claims 0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "claims 3 bytes"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 2) + b"{", "claims 2 bytes"),
        (struct.pack("<Q", 3) + b"\xff\xfe{", "damaged or cut short"),
        (struct.pack("<Q", 16) + b'{"a":{},"a":{}} ', "something twice"),
        (struct.pack("<Q", 100_000) + b'{"a":' * 20_000, "recursion"),
        (struct.pack("<Q", 2) + b"{}" + b"data", "describes 10 bytes, but it has 14"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ModelError, match=said) as caught:
        read_header(tmp_path / "file")
    assert "again" in str(caught.value.hint)


def test_cut_short_anywhere_or_longer_it_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match="damaged or cut short"):
            load_model(folder, dtype=torch.float32)
    path.write_bytes(content + b"\0")
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_model(folder, dtype=torch.float32)


def test_a_flipped_bit_in_the_header_never_does_worse_than_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    chance = random.Random(4)
    refused = 0
    for _ in range(300):
        place, bit = chance.randrange(8 + length), 1 << chance.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        try:
            for name in read_header(path):
                MappedFile(path).tensor(name).sum()
            load_model(folder, dtype=torch.float32)
        except ModelError:
            refused += 1
        content[place] ^= bit
    assert refused > 200, "what remains are flips in padding and in what the format calls metadata"


def test_what_we_write_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.bfloat16),
        "b": torch.randn(3, 5).T,
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float16),
    }
    shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    write(tmp_path / "file", shapes, tensors.items())
    theirs, ours = load_file(tmp_path / "file"), MappedFile(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours.tensor(name), tensor)
    assert read_header(tmp_path / "file")["a"].begin % 64 == 0, "where the processor reads whole lines"
