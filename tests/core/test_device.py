"""The device and the number format are chosen once and said aloud."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gale.core.device import choose_compute


def test_the_format_is_what_was_asked_for_and_the_reason_says_so() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        compute = choose_compute(precision)
        assert compute.dtype == dtype
        assert compute.reason.endswith(f"{precision}, as asked")


def test_left_alone_it_takes_bf16_only_where_the_hardware_multiplies_in_it() -> None:
    compute = choose_compute("auto")
    assert compute.dtype == (torch.float32 if "no bf16 instructions" in compute.reason else torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell how much memory it has")
def test_large_memory_goes_back_to_the_system_when_it_is_freed_whatever_was_asked_for_after_it() -> None:
    script = """
import os, torch
from gale.core.device import return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

return_freed_memory()
before = resident()
for _ in range(2):
    pieces = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
    last = pieces.pop()
    del pieces
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40, "one of 32 pieces is left, where glibc would have kept half of them"
