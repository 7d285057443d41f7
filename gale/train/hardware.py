"""What machines can do: a table of accelerators from their data sheets, and a measurement of this one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from gale.core.errors import GaleError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (for TPUs one chip), as sold.

    ``flops`` is the dense bf16 peak in FLOP/s (fp16 where there is no bf16), ``memory`` in bytes, ``bandwidth`` of
    that memory in bytes/s, ``link`` and ``network`` the bytes/s that one device sends to its neighbours in the node
    and to other nodes, ``watts`` the design power, ``utilisation`` the share of the peak that good training runs
    reach in model FLOPs (MFU, Chowdhery et al. 2022), ``price`` a usual rent in dollars an hour.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    watts: float
    utilisation: float
    utilisation_reason: str
    price: float | None = None
    per_node: int = 8


_LLAMA_3 = "Llama 3 reports 38-43% on H100 (Grattafiori et al. 2024)"
_LLAMA_2 = "Llama 2's GPU hours are 40-43% of A100's peak (Touvron et al. 2023)"
_GUESS = "no large published run at hand; a cautious guess"

# Rents are what such devices cost about when this table was written; they change every month, so give your own.
DEVICES = {
    device.name: device
    for device in (
        Device("v100", 125e12, 32 * GIB, 0.9e12, 150e9, 12.5e9, 300, 0.21, "GPT-3 by Chowdhery et al. 2022", 0.8),
        Device("a100-40gb", 312e12, 40 * GIB, 1.555e12, 300e9, 25e9, 400, 0.40, _LLAMA_2, 1.3),
        Device("a100", 312e12, 80 * GIB, 2.04e12, 300e9, 25e9, 400, 0.40, _LLAMA_2, 1.6),
        Device("h100", 989e12, 80 * GIB, 3.35e12, 450e9, 50e9, 700, 0.40, _LLAMA_3, 3.0),
        Device("h800", 989e12, 80 * GIB, 3.35e12, 200e9, 50e9, 700, 0.40, _LLAMA_3, 2.0),
        Device("h200", 989e12, 141 * GIB, 4.8e12, 450e9, 50e9, 700, 0.40, _LLAMA_3, 3.5),
        Device("b200", 2250e12, 180 * GIB, 7.7e12, 900e9, 50e9, 1000, 0.35, _GUESS, 5.0),
        Device("mi300x", 1307e12, 192 * GIB, 5.3e12, 448e9, 50e9, 750, 0.30, _GUESS, 2.5),
        Device("rtx-3090", 71e12, 24 * GIB, 0.936e12, 16e9, 1.25e9, 350, 0.40, _GUESS, 0.25),
        Device("rtx-4090", 165e12, 24 * GIB, 1.008e12, 16e9, 1.25e9, 450, 0.40, _GUESS, 0.45),
        Device("ascend-910", 256e12, 32 * GIB, 1.2e12, 30e9, 12.5e9, 310, 0.30, _GUESS),
        Device("tpu-v3", 123e12, 32 * GIB, 0.9e12, 80e9, 80e9, 220, 0.325, "Gopher by Chowdhery et al. 2022", 2.0, 4),
        Device("tpu-v4", 275e12, 32 * GIB, 1.2e12, 50e9, 50e9, 192, 0.46, "PaLM (Chowdhery et al. 2022)", 3.2, 4),
    )
}


def find_device(name: str) -> Device:
    """The device called ``name``. Raises :class:`GaleError` with the names there are."""
    try:
        return DEVICES[name.lower()]
    except KeyError as error:
        raise GaleError(
            f"Gale knows no device {name!r}.", hint=f"Known: {', '.join(DEVICES)}; or --measure this machine."
        ) from error


def measure_device(*, seconds: float = 1.0, watts: float = 100.0) -> Device:
    """This machine: the fastest of many matrix products in the number format training would use, and its memory."""
    import torch

    from gale.core.device import choose_compute

    compute = choose_compute()
    size = 1024 if compute.device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=compute.device).to(compute.dtype) for _ in range(2))

    def once() -> float:
        began = time.perf_counter()
        torch.mm(a, b)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, once())
    if compute.device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(compute.device).total_memory)
    else:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    copied = torch.empty(2**26, dtype=torch.uint8, device=compute.device)
    began = time.perf_counter()
    copied.clone()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    bandwidth = 2 * copied.numel() / (time.perf_counter() - began)
    return Device(
        f"this machine ({compute.reason})",
        flops=2 * size**3 / best,
        memory=memory,
        bandwidth=bandwidth,
        link=bandwidth,
        network=1.25e9,
        watts=watts,
        utilisation=0.4,
        utilisation_reason="about what Gale's own loop reaches of a measured product on CPUs",
        per_node=1,
    )
