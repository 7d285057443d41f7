"""Which device and which number format to compute in, probed once and said aloud."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from gale.core.settings import settings

Precision = Literal["auto", "bf16", "fp32"]

# Options of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Larger than what a step computes between two layers, and how much of that is kept for the next step.
_LARGE_BYTES, _KEPT_BYTES = 4 * 2**20, 32 * 2**20


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, the dtype of its matrix products, and why; ``unit`` is the device's name."""

    device: torch.device
    dtype: torch.dtype
    unit: str
    reason: str


@cache
def choose_compute(precision: Precision = "auto") -> Compute:
    """CUDA where there is one, else the CPU; bf16 where the hardware multiplies in it, else fp32.

    On processors without AVX512-BF16 or AMX bf16 is emulated and slower than fp32.
    """
    if torch.cuda.is_available():
        device, has_bf16, unit = torch.device("cuda"), torch.cuda.is_bf16_supported(), torch.cuda.get_device_name()
    else:
        device = torch.device("cpu")
        has_amx, has_avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        has_bf16 = has_amx or has_avx
        unit = "CPU with " + ("AMX" if has_amx else "AVX512-BF16" if has_avx else "no bf16 instructions")
        torch.set_num_threads(settings().threads or torch.get_num_threads())
    if precision == "auto":
        dtype = torch.bfloat16 if has_bf16 else torch.float32
        return Compute(device, dtype, unit, f"{unit}: {_name(dtype)}")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Compute(device, dtype, unit, f"{unit}: {_name(dtype)}, as asked")


def keep_freed_memory() -> None:
    """Let the C library keep what is freed instead of handing it back to the system; for work in equal steps.

    The next step asks for as much again, and every page that the system hands out anew it first fills with zeros:
    measured, 2 to 6% of a training step. Without glibc nothing is done.
    """
    _set_thresholds(trim=2**31 - 1, mmap=2**31 - 1)


def return_freed_memory() -> None:
    """Let the C library hand back what was freed, and from now on what is large, such as keys and values, at once.

    For work that lasts. Left alone it keeps pieces of up to 32 MiB for itself once one of them was freed, and what is
    asked for next seldom fits into the gaps: measured, a sixth of an engine's memory. Without glibc nothing is done.
    """
    if (library := _set_thresholds(trim=_KEPT_BYTES, mmap=_LARGE_BYTES)) is not None:
        library.malloc_trim(0)


def _set_thresholds(*, trim: int, mmap: int) -> ctypes.CDLL | None:
    """The C library if it is one that has such thresholds, that is glibc."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, trim)
        library.mallopt(_MMAP_THRESHOLD, mmap)
    except (OSError, TypeError, AttributeError):
        return None
    return library


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
