"""The device and the number format are chosen once and said aloud."""

from __future__ import annotations

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
