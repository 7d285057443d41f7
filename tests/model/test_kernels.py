"""The native kernels against float64 and against torch, at every level of instructions that this machine has."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gale.engine.kv_cache import attend_one
from gale.model import kernels
from gale.model.kernels.build import library
from gale.model.transformer import RMSNorm, rotate

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {library()[1]}")

LEVELS = ("any processor", "AVX2", "AVX-512 VNNI")
SHAPES = [(64, 32), (100, 50), (65, 33), (1, 1), (384, 512)]  # outputs and inputs


@pytest.fixture(params=range(3), ids=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    native = kernels._native()
    assert native is not None
    if native.gale_level(request.param) < request.param:
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    yield request.param
    native.gale_level(2)


def rounded_activations(x: Tensor) -> Tensor:
    """What the kernels make of activations, as real numbers."""
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    return (x.double() / scale).nan_to_num().round() * scale


def unpacked(bits: int, packed: Tensor, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Numbers [outputs, inputs] from the order that packed.h tells of, and of int4 the scales [outputs, groups]."""
    panels, scales = -(-outputs // 64), torch.empty(0)
    if bits == 4:
        groups = packed.view(panels, -1, 1152)
        scales = groups[..., 1024:].contiguous().view(torch.float16).transpose(1, 2).flatten(0, 1)[:outputs].float()
        bytes_ = groups[..., :1024].reshape(panels, -1, 64, 4)
        words = torch.stack([bytes_ & 15, bytes_ >> 4], dim=3).flatten(3).int() - 8
    elif bits == 8:
        words = packed.view(panels, -1, 64, 4).int() - 128
    else:
        words = packed.view(torch.bfloat16).view(panels, -1, 64, 2)
    return words.transpose(1, 2).reshape(panels * 64, -1)[:outputs, :inputs], scales


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-7, 1e4])  # the others make scales near the ends of fp16
def test_weights_are_packed_to_the_bit_as_they_are_or_as_torch_rounds_them(
    outputs: int, inputs: int, size: float
) -> None:
    torch.manual_seed(outputs)
    weight = (torch.randn(outputs, inputs) * size).bfloat16()
    weight[outputs // 2] = 0
    for bits in (8, 4):  # both from bf16 and from fp32
        assert all(map(torch.equal, kernels.pack(bits, weight), kernels.pack(bits, weight.float())))
    if inputs % 2 == 0:
        assert torch.equal(unpacked(16, kernels.pack(16, weight)[0], outputs, inputs)[0], weight)
    packed, scales = kernels.pack(8, weight)
    largest = weight.float().abs().amax(-1)
    assert torch.equal(scales[:outputs], largest / 127)
    inverses = (torch.tensor(127.0) / largest).nan_to_num(posinf=0)[:, None]
    assert torch.equal(unpacked(8, packed, outputs, inputs)[0], (weight.float() * inverses).round().int())
    numbers, chosen = unpacked(4, kernels.pack(4, weight)[0], outputs, inputs)
    wide = F.pad(weight.float(), (0, -inputs % 32)).unflatten(1, (-1, 32))
    furthest = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))

    def rounded(scale: Tensor) -> Tensor:
        return (wide * (torch.tensor(1.0) / scale).nan_to_num(posinf=0, neginf=0)).round().clamp(-8, 7)

    def error(scale: Tensor) -> Tensor:
        return (rounded(scale) * scale - wide).double().square().sum(-1)

    tried = [(furthest / (-9 + 0.25 * step)).half().float() for step in range(12)]
    assert torch.stack([chosen[..., None] == scale for scale in tried]).any(0).all()
    least = torch.stack([error(scale) for scale in tried]).amin(0)
    assert (error(chosen[..., None]) <= least * (1 + 1e-5)).all()
    assert torch.equal(numbers, rounded(chosen[..., None]).flatten(1)[:, :inputs].int())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_equal_those_of_the_rounded_numbers(level: int, bits: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(outputs)
    weight, x, bias = torch.randn(outputs, inputs), torch.randn(13, inputs), torch.randn(outputs)
    packed, scales = kernels.pack(bits, weight)
    got = kernels.linear(bits, x, packed, scales, bias, outputs)
    identity = torch.eye(inputs)  # 1 is 127 of 127, so this reads the weights out
    rounded = kernels.linear(bits, identity, packed, scales, None, outputs).double().t()
    torch.testing.assert_close(got.double(), rounded_activations(x) @ rounded.t() + bias, atol=2e-4, rtol=1e-4)
    step = weight.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 6.25)
    assert ((rounded - weight).abs() <= 0.55 * step).all() or bits == 4
    assert (rounded - weight).norm() <= (0.01 if bits == 8 else 0.1) * weight.norm()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_result_is_the_same_alone_and_among_others(level: int, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 96).to(dtype)
    packed, scales = kernels.pack(bits, torch.randn(200, 96))
    whole = kernels.linear(bits, x, packed, scales, None, 200)
    for rows in (1, 2, 3, 5, 7, 11, 12, 13, 25):
        assert torch.equal(kernels.linear(bits, x[3 : 3 + rows], packed, scales, None, 200), whole[3 : 3 + rows])


@pytest.mark.skipif(not kernels.has_bf16(), reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (100, 50), (1, 2), (384, 512)])
def test_bf16_products_equal_float64_and_a_row_does_not_depend_on_the_others(outputs: int, inputs: int) -> None:
    torch.manual_seed(4)
    weight, x, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(40, inputs).bfloat16(), torch.randn(outputs)
    packed, scales = kernels.pack(16, weight)
    whole = kernels.linear(16, x, packed, scales, bias, outputs)
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().t() + bias, atol=1e-2, rtol=2**-7)
    for rows in (1, 2, 5, 6, 7, 13, 25):
        assert torch.equal(kernels.linear(16, x[3 : 3 + rows], packed, scales, bias, outputs), whole[3 : 3 + rows])


def test_every_level_computes_the_same_int8() -> None:
    native = kernels._native()
    assert native is not None
    torch.manual_seed(2)
    x, (packed, scales) = torch.randn(9, 130), kernels.pack(8, torch.randn(70, 130))
    results = []
    for most in range(3):
        native.gale_level(most)
        results.append(kernels.linear(8, x, packed, scales, None, 70))
    native.gale_level(2)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_extremes_stay_numbers(level: int, bits: int) -> None:
    weight = torch.tensor([[0.0] * 40, [1e30] * 40, [1e-30] * 40, [-3.0] + [0.0] * 39])
    x = torch.tensor([[0.0] * 40, [1e-8] * 40, [2.0] * 40])
    packed, scales = kernels.pack(bits, weight)
    got = kernels.linear(bits, x, packed, scales, None, 4)
    assert got.isfinite().all()
    assert (got[0] == 0).all() and (got[:, 0] == 0).all()
    torch.testing.assert_close(got[2, 3], torch.tensor(-6.0), atol=1e-2, rtol=1e-2)


@torch.inference_mode()
def test_norm_rotation_and_gate_equal_torch() -> None:
    """To the last place of bf16 or two: torch adds squares in another order."""
    torch.manual_seed(3)
    heads = torch.randn(7, 3, 64).bfloat16()
    norm = RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    angles = torch.randn(7, 1, 64)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    assert kernels.serve(heads)
    wide = heads.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight
    torch.testing.assert_close(kernels.norm(heads, norm.weight, 1e-6), expected, atol=0, rtol=2**-7)
    torch.testing.assert_close(
        kernels.norm_rotate(heads, norm.weight, 1e-6, cos, sin), rotate(expected, cos, sin), atol=0.03, rtol=2**-6
    )
    assert torch.equal(kernels.norm_rotate(heads, None, 1e-6, cos, sin), rotate(heads, cos, sin))
    gate, up = torch.randn(5, 33).bfloat16() * 20, torch.randn(5, 33).bfloat16()
    torch.testing.assert_close(kernels.silu_gate(gate, up), F.silu(gate) * up, atol=1e-30, rtol=2**-6)


@torch.inference_mode()
def test_the_likeliest_token_is_the_first_of_the_largest() -> None:
    torch.manual_seed(5)
    rows = torch.randn(40, 1000).bfloat16()  # so coarse that most rows have their largest number more than once
    rows[0], rows[1], rows[2] = -3.0, -0.0, float("-inf")
    rows[1, 7] = 0.0
    rows[3, 999], rows[4, 5] = float("inf"), 1e30
    assert torch.equal(kernels.likeliest(rows), rows.float().argmax(-1))
    assert kernels.likeliest(rows[:, :1]).eq(0).all()


def caches(lengths: list[int], key_heads: int, size: int, capacity: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """Of two layers; what is not filled yet is no number, so that reading it shows."""
    made = []
    for length in lengths:
        pair = torch.randn(2, 2, key_heads, capacity, size).bfloat16()
        pair[:, :, :, length:] = float("nan")
        made.append((pair[0], pair[1], length, 0))
    return made


@pytest.mark.skipif(not kernels.can_attend(), reason="this processor has no AVX512-BF16")
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), min_size=1, max_size=4),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([4, 8, 32, 40, 64, 96]),
    window=st.sampled_from([None, 1, 7, 33]),
    seed=st.integers(0, 1000),
)
def test_attention_equals_float64_and_does_not_depend_on_how_tokens_come(
    lengths: list[tuple[int, int]], key_heads: int, group: int, size: int, window: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    held = caches([length for length, _ in lengths], key_heads, size, 101)
    batch = [(keys, values, length, new) for (keys, values, length, _), (_, new) in zip(held, lengths, strict=True)]
    rows = sum(new for _, new in lengths)
    q = torch.randn(rows, group * key_heads, size).bfloat16()
    k, v = torch.randn(2, rows, key_heads, size).bfloat16()
    out = kernels.attend(kernels.sequences(batch), 1, q, k, v, window)
    row = 0
    for keys, values, length, new in batch:
        here = slice(row, row + new)
        assert torch.equal(keys[1, :, length : length + new], k[here].transpose(0, 1))
        end = length + new
        expected = attend_one(q[here].double(), keys[1, :, :end].double(), values[1, :, :end].double(), window)
        torch.testing.assert_close(out[here].double(), expected, atol=2e-2, rtol=2e-2)
        for token in range(new):
            alone = kernels.sequences([(keys, values, length + token, 1)])
            at = slice(row + token, row + token + 1)
            assert torch.equal(kernels.attend(alone, 1, q[at], k[at], v[at], window), out[at])
        row += new


def test_threads_of_one_process_may_call_at_once() -> None:
    packed, scales = kernels.pack(8, torch.randn(512, 256))
    x = torch.randn(64, 256)
    expected = kernels.linear(8, x, packed, scales, None, 512)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(
            turn for turn in range(50) if not torch.equal(kernels.linear(8, x, packed, scales, None, 512), expected)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_a_fork(packed: Tensor, scales: Tensor, x: Tensor, expected: Tensor) -> None:
    os._exit(0 if torch.equal(kernels.linear(8, x, packed, scales, None, len(packed) // 256), expected) else 1)


def test_a_forked_process_has_threads_of_its_own() -> None:
    packed, scales = kernels.pack(8, torch.randn(512, 256))
    x = torch.randn(64, 256)
    expected = kernels.linear(8, x, packed, scales, None, 512)
    child = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=(packed, scales, x, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_without_a_compiler_one_line_says_so_and_torch_serves(tmp_path: Path) -> None:
    script = """
import torch
from gale.model import kernels
from gale.model.packed import PackedLinear, round_weight
with torch.inference_mode():
    x = torch.randn(3, 64).bfloat16()
    layer = PackedLinear(8, 64, 5, *round_weight(8, torch.randn(5, 64)), None)
    print(kernels.available(), kernels.serve(x), layer(x).shape)
"""
    for changes, said in (({"CXX": "/bin/false"}, 1), ({"GALE_KERNELS": "off"}, 0)):
        ran = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "GALE_HOME": str(tmp_path), **changes},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "False False torch.Size([3, 5])" in ran.stdout
        assert (ran.stdout + ran.stderr).count("no_native_kernels") == said
