"""The native kernels: what stock torch lacks on a CPU, in plain C++ over raw pointers.

They serve under ``torch.inference_mode`` on bf16 tensors on a CPU. Everything that they do torch does too, only slower:
without a compiler, or with ``GALE_KERNELS=off``. ``linear.cpp`` multiplies with quantised weights, ``attention.cpp``
attends, ``rows.cpp`` normalises, rotates, gates and finds the likeliest token. ``decoder.cpp`` puts
whole layers together.

Shape suffixes as in :mod:`gale.model.transformer`; O outputs of a linear layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TypeAlias

import structlog
import torch
from torch import Tensor

from gale.core.settings import settings
from gale.model.kernels.build import library

log = structlog.get_logger()

_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "gale_level": (_I, [_I]),
    "gale_can_attend": (_I, []),
    "gale_has_bf16": (_I, []),
    "gale_packed_bytes": (ctypes.c_long, [_I, _I, _I]),
    "gale_pack": (None, [_I, _P, ctypes.c_bool, _I, _I, _P, _P, _I]),
    "gale_linear": (None, [_P, _P, ctypes.c_bool, _I, _P, _I]),
    "gale_norm": (None, [_P, _P, _F, _I, _I, _P, _I]),
    "gale_norm_rotate": (None, [_P, _P, _F, _P, _P, _I, _I, _I, _P, _I]),
    "gale_silu_gate": (None, [_P, _P, _I, _I, _P, _I]),
    "gale_likeliest": (None, [_P, _I, _I, _P, _I]),
    "gale_decode": (None, [_P, _P, _I, _P, _I, _P, _P, _P, _P, _I]),
    "gale_attend": (None, [_P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _I, _F, _I]),
}
_plain_room = partial(torch.empty, dtype=torch.uint8)
_PANEL = 64  # outputs that are packed together, see linear.cpp


@cache
def _native() -> ctypes.CDLL | None:
    """The library, or None where it is switched off or cannot be had; then one line says why."""
    if not settings().kernels:
        return None
    path, reason = library()
    if path is not None:
        try:
            native = ctypes.CDLL(str(path))
        except OSError as error:
            path, reason = None, str(error)
    if path is None:
        log.warning("no_native_kernels", reason=reason, using="torch, which is slower")
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native


def _required() -> ctypes.CDLL:
    native = _native()
    assert native is not None, "ask whether the kernels are there first"
    return native


@cache
def threads() -> int:
    """Threads of the kernels: as many as torch had when they were first asked, in a pool of their own."""
    return torch.get_num_threads()


def available() -> bool:
    """Whether there are kernels here."""
    return _native() is not None


def serve(x: Tensor) -> bool:
    """Whether the kernels take ``x``: not where gradients or a compiler may want to follow."""
    return (
        x.dtype is torch.bfloat16
        and torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _native() is not None
    )


@cache
def has_bf16() -> bool:
    """Whether this processor has the instructions for bf16 weights."""
    native = _native()
    return native is not None and bool(native.gale_has_bf16())


def pack(bits: int, weight_OC: Tensor, room: Callable[[int], Tensor] = _plain_room) -> tuple[Tensor, Tensor]:
    """Weights as they are (16 bits: bf16, an even number of inputs) or rounded, in the order in which they are read.

    8 bits have a scale an output, which comes second, and 4 bits one for 32 inputs, packed with them. They are written
    to the ``room`` that there is for so many bytes; bf16 weights are nowhere copied in between.
    """
    outputs, inputs = weight_OC.shape
    wide = weight_OC.dtype is not torch.bfloat16
    assert bits != 16 or (inputs % 2 == 0 and not wide)
    weight_OC = (weight_OC.float() if wide else weight_OC).contiguous()
    packed_bytes, scales = packed_sizes(bits, outputs, inputs)
    packed, scales_O = room(packed_bytes), torch.empty(scales)
    _required().gale_pack(
        bits, weight_OC.data_ptr(), wide, outputs, inputs, packed.data_ptr(), scales_O.data_ptr(), threads()
    )
    return packed, scales_O


def packed_sizes(bits: int, outputs: int, inputs: int) -> tuple[int, int]:
    """Bytes of packed weights, and how many scales stand beside them."""
    native = _required()
    return native.gale_packed_bytes(bits, outputs, inputs), -(-outputs // _PANEL) * _PANEL if bits == 8 else 0


class Matrix(ctypes.Structure):
    """Packed weights, as the kernels know them: addresses, so the tensors must outlive it."""

    _fields_ = (
        ("packed", _P),
        ("scales", _P),
        ("bias", _P),
        ("bits", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )

    @classmethod
    def of(
        cls, bits: int, packed: Tensor, scales_O: Tensor, bias_O: Tensor | None, inputs: int, outputs: int
    ) -> Matrix:
        """What :func:`pack` made, with a bias in fp32."""
        bias = None if bias_O is None else bias_O.data_ptr()
        return cls(packed.data_ptr(), scales_O.data_ptr(), bias, bits, inputs, outputs, 0)


def linear(bits: int, x_NC: Tensor, packed: Tensor, scales_O: Tensor, bias_O: Tensor | None, outputs: int) -> Tensor:
    """``x_NC`` (bf16; or fp32, for rounded weights) times packed weights, plus a bias in fp32.

    A row's result is the same to the bit whatever else is in the batch.
    """
    native = _required()
    x_NC = x_NC.contiguous()
    out_NO = torch.empty((len(x_NC), outputs), dtype=x_NC.dtype)
    matrix = Matrix.of(bits, packed, scales_O, bias_O, x_NC.shape[1], outputs)
    wide = x_NC.dtype is torch.float32
    native.gale_linear(ctypes.byref(matrix), x_NC.data_ptr(), wide, len(x_NC), out_NO.data_ptr(), threads())
    return out_NO


def norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    native = _required()
    x_NC = x_NC.contiguous()
    out_NC = torch.empty_like(x_NC)
    size = x_NC.shape[-1]
    native.gale_norm(
        x_NC.data_ptr(),
        weight_C.data_ptr(),
        eps,
        x_NC.numel() // size,
        size,
        out_NC.data_ptr(),
        threads(),
    )
    return out_NC


def norm_rotate(x_NHD: Tensor, weight_D: Tensor | None, eps: float, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """RMSNorm of each head where there is a weight for it, then RoPE with tables [N, 1, D]."""
    native = _required()
    x_NHD = x_NHD.contiguous()
    out_NHD = torch.empty_like(x_NHD)
    native.gale_norm_rotate(
        x_NHD.data_ptr(), None if weight_D is None else weight_D.data_ptr(), eps, cos_ND.data_ptr(), sin_ND.data_ptr(),
        *x_NHD.shape, out_NHD.data_ptr(), threads(),
    )  # fmt: skip
    return out_NHD


def silu_gate(x_NI: Tensor, up_NI: Tensor) -> Tensor:
    """``silu(x) * up``."""
    native = _required()
    out_NI = torch.empty_like(x_NI)
    native.gale_silu_gate(x_NI.data_ptr(), up_NI.data_ptr(), *x_NI.shape, out_NI.data_ptr(), threads())
    return out_NI


def likeliest(x_NV: Tensor) -> Tensor:
    """The place [N] of the largest number of each row; of several, the first."""
    x_NV = x_NV.contiguous()
    out_N = torch.empty(len(x_NV), dtype=torch.int64)
    _required().gale_likeliest(x_NV.data_ptr(), *x_NV.shape, out_N.data_ptr(), threads())
    return out_N


class CachedSequence(ctypes.Structure):
    """A sequence of :func:`attend`: caches [L, K, capacity, D], tokens held, and which rows of the batch are new."""

    _fields_ = (
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("layer_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("length", ctypes.c_int32),
        ("first_row", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


@cache
def can_attend() -> bool:
    """Whether this processor has the instructions for :func:`attend`."""
    native = _native()
    return native is not None and bool(native.gale_can_attend())


Batch: TypeAlias = "ctypes.Array[CachedSequence]"


def sequences(caches: Sequence[tuple[Tensor, Tensor, int, int]]) -> Batch:
    """A batch for :func:`attend`: of each sequence its keys and values [L, K, capacity, D], tokens held, new tokens."""
    row, items = 0, []
    for keys_LKTD, values_LKTD, length, count in caches:
        layer, head = keys_LKTD.stride(0), keys_LKTD.stride(1)
        assert keys_LKTD.stride() == values_LKTD.stride() and length + count <= keys_LKTD.shape[2]
        items.append(CachedSequence(keys_LKTD.data_ptr(), values_LKTD.data_ptr(), layer, head, length, row, count, 0))
        row += count
    return (CachedSequence * len(items))(*items)


def attend(batch: Batch, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, window: int | None) -> Tensor:
    """Store the new keys and values, and attend causally to all that each sequence holds: [N, H, D] -> [N, H, D].

    Every query's result is the same to the bit whatever else is in the batch, and however its prompt was cut.
    """
    native = _required()
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    out_NHD = torch.empty_like(q_NHD)
    heads, size = q_NHD.shape[1:]
    native.gale_attend(
        batch, len(batch), layer, q_NHD.data_ptr(), k_NKD.data_ptr(), v_NKD.data_ptr(), out_NHD.data_ptr(),
        heads, k_NKD.shape[1], size, window or 0, size**-0.5, threads(),
    )  # fmt: skip
    return out_NHD


def decode(
    decoder: ctypes.Structure, batch: Batch, x_NC: Tensor, positions_N: Tensor, cos_PD: Tensor, sin_PD: Tensor
) -> Tensor:
    """All layers of a decoder, see :class:`gale.model.native.NativeLayers`; ``x_NC`` is written over.

    The tables have a row for each position that a token can have.
    """
    x_NC, out_NC = x_NC.contiguous(), torch.empty_like(x_NC)
    _required().gale_decode(
        ctypes.byref(decoder), batch, len(batch), x_NC.data_ptr(), len(x_NC), positions_N.data_ptr(),
        cos_PD.data_ptr(), sin_PD.data_ptr(), out_NC.data_ptr(), threads(),
    )  # fmt: skip
    return out_NC
