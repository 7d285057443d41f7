"""How a model is laid over devices, and what each then holds in memory.

Weights are kept in bf16, gradients summed in fp32, and the optimiser's fp32 masters and two moments beside them, as
Gale's own loop does: 18 bytes a parameter. Sharding after ZeRO (Rajbhandari et al. 2020), activations after Korthikanti
et al. 2022 with fused attention, pipelines run one forward, one backward (Narayanan et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gale.train.hardware import GIB, Device
from gale.train.plan_model import PlannedModel

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMISER_BYTES = 2, 4, 12
_RUNTIME_BYTES = 1.5 * GIB  # contexts of driver and communication libraries
_USABLE = 0.94  # the allocator's fragments take the rest
_RECOMPUTED = 4 / 3  # one more forward pass to the three that a step costs
SHARDINGS = ("none (DDP)", "optimiser (ZeRO-1)", "optimiser and gradients (ZeRO-2)", "everything (FSDP, ZeRO-3)")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True, slots=True)
class Layout:
    """``data`` x ``tensor`` x ``pipeline`` devices; ``sharding`` is the ZeRO level among the data-parallel ones."""

    data: int
    tensor: int
    pipeline: int
    sharding: int
    recompute: bool
    memory: Memory
    step_seconds: float  # for comparing layouts: at the device's usual rate, with what its links add


def memory_of(
    model: PlannedModel,
    *,
    sequence: int,
    micro_sequences: int = 1,
    data: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    sharding: int = 0,
    recompute: bool = False,
) -> Memory:
    """What one device of the first or last pipeline stage holds, whichever holds more."""
    tokens = sequence * micro_sequences
    layers = math.ceil(model.layers / pipeline)
    embedding = model.vocabulary * model.hidden * (1 if model.tied else 2)
    # Embedding and head stand on the outer stages alone.
    here = ((model.parameters - embedding) * layers / model.layers + embedding / (1 if pipeline == 1 else 2)) / tensor
    shards = [1 if sharding < level else data for level in (3, 2, 1)]
    one_layer = (model.parameters - embedding) / model.layers / tensor
    gathered = 2 * WEIGHT_BYTES * one_layer if sharding == 3 else 0.0  # the layer that works and the next one

    # Of a layer and token, in bf16: both norms' inputs, the projections' inputs, q, k, v, and the feed-forward's.
    wide = (2 * model.heads + 2 * model.kv_heads) * model.head_dim + (3 if model.gated else 2) * model.intermediate
    kept = 2 * (4 * model.hidden + wide) * tokens / tensor
    if recompute:
        layer_bytes, working = 2 * model.hidden * tokens / tensor, kept
    else:
        layer_bytes, working = kept, 0.0
    in_flight = pipeline  # micro-batches whose activations the first stage holds
    logits = 10 * model.vocabulary * tokens / tensor  # bf16, and fp32 with its gradient
    return Memory(
        weights=WEIGHT_BYTES * here / shards[0] + gathered,
        gradients=GRADIENT_BYTES * here / shards[1],
        optimiser=OPTIMISER_BYTES * here / shards[2],
        activations=layer_bytes * layers * in_flight + working + logits,
    )


def usable_memory(device: Device) -> float:
    """Bytes of a device that training can fill."""
    return device.memory * _USABLE - min(_RUNTIME_BYTES, 0.2 * device.memory)


def lay_out(model: PlannedModel, device: Device, devices: int, *, sequence: int, batch_sequences: int) -> Layout | None:
    """The fastest layout that fits ``devices``, the simpler one where two are within 3%; None where none fits.

    Rules: a model that fits a device, its optimiser sharded if need be, is not split; tensor parallelism stays within
    a node, where links are fast, and divides the heads; pipelines divide the layers; every data-parallel group needs a
    sequence of its own in each step.
    """
    fitting = [
        layout
        for layout in _candidates(model, device, devices, sequence, batch_sequences)
        if layout.memory.total <= usable_memory(device)
    ]
    whole = [each for each in fitting if each.tensor * each.pipeline == 1 and each.sharding < 2 and not each.recompute]
    best: Layout | None = None
    for layout in whole or fitting:
        if best is None or layout.step_seconds < 0.97 * best.step_seconds:
            best = layout
    return best


def least_devices(model: PlannedModel, device: Device, *, sequence: int, batch_sequences: int) -> int | None:
    """The least power of two of devices on which the model can be trained, up to 65,536."""
    for exponent in range(17):
        if lay_out(model, device, 2**exponent, sequence=sequence, batch_sequences=batch_sequences):
            return int(2**exponent)
    return None


def _candidates(
    model: PlannedModel, device: Device, devices: int, sequence: int, batch_sequences: int
) -> Iterator[Layout]:
    """Simplest first: little recomputation and sharding before splitting the model."""
    for pipeline in (p for p in range(1, model.layers + 1) if model.layers % p == 0 and devices % p == 0):
        for tensor in (t for t in (1, 2, 4, 8) if t <= device.per_node and model.heads % t == 0):
            data, rest = divmod(devices, tensor * pipeline)
            if rest or data < 1 or data > batch_sequences:
                continue
            for sharding in (0, 1, 2, 3) if pipeline == 1 else (0, 1):  # finer shards would be gathered per micro-batch
                if sharding and data == 1:
                    continue
                for recompute in (False, True):
                    memory = memory_of(
                        model,
                        sequence=sequence,
                        data=data,
                        tensor=tensor,
                        pipeline=pipeline,
                        sharding=sharding,
                        recompute=recompute,
                    )
                    seconds = _step_seconds(
                        model, device, sequence, batch_sequences, data, tensor, pipeline, sharding, recompute
                    )
                    yield Layout(data, tensor, pipeline, sharding, recompute, memory, seconds)


def _step_seconds(
    model: PlannedModel,
    device: Device,
    sequence: int,
    batch_sequences: int,
    data: int,
    tensor: int,
    pipeline: int,
    sharding: int,
    recompute: bool,
) -> float:
    """Computing at the usual rate, the pipeline's bubble, and what communication cannot be hidden behind it."""
    devices = data * tensor * pipeline
    rate = device.flops * device.utilisation
    flops = model.flops_per_token(sequence) * sequence * batch_sequences * (_RECOMPUTED if recompute else 1)
    computing = flops / (devices * rate)
    micro_batches = max(1, batch_sequences // data)
    bubble = computing * (pipeline - 1) / micro_batches
    # Four all-reduces a layer of one activation each (Shoeybi et al. 2019), on the links of the node.
    exchanged = 4 * model.layers / pipeline * 2 * 2 * (tensor - 1) / tensor * sequence * model.hidden * micro_batches
    within = exchanged * (1.5 if recompute else 1) / device.link
    # Gradients are reduced once a step in fp32, sharded ones in every micro-batch; then weights are gathered, sharded
    # ones in every forward and backward pass.
    own = model.parameters / (tensor * pipeline)
    between = 0.0
    if data > 1:
        between = GRADIENT_BYTES * own * (2 if sharding == 0 else 1 if sharding == 1 else micro_batches)
    if sharding:
        between += WEIGHT_BYTES * own * ((3 if recompute else 2) * micro_batches if sharding == 3 else 1)
    speed = device.link if devices <= device.per_node else device.network
    # The optimiser reads and writes its state once a step.
    stepping = 2 * (WEIGHT_BYTES + GRADIENT_BYTES + OPTIMISER_BYTES) * own / (data if sharding else 1)
    return computing + bubble + within + max(0.0, between / speed - 0.7 * computing) + stepping / device.bandwidth
