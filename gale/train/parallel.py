"""Several processes as one run: who we are, what is added up, and weights sharded over all (FSDP2, Zhao et al. 2023).

A launcher (torchrun, or Ray Train) starts the processes and says so in the environment. Rows are dealt out by their
number in the run, so one process and eight read the same rows in the same steps, and a run may be resumed with another
number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gale.core.errors import GaleError
from gale.model.transformer import Block


@dataclass(frozen=True, slots=True)
class World:
    """Process ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(device_total := total.to(_communication_device()))
        return [float(value) for value in device_total]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A :class:`GaleError` raised in the block by one process is raised in all; none waits for one that gave up."""
        if self.size == 1:
            yield
            return
        own: GaleError | None = None
        try:
            yield
        except GaleError as error:
            own = error
        errors: list[GaleError | None] = [None] * self.size
        dist.all_gather_object(errors, own)
        if first := next((error for error in errors if error is not None), None):
            raise own or first

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that a launcher started; alone where there is none. Leaves the group at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():  # by Ray Train, which also ends it
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if size == 1:
        yield World()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> None:
    """Spread the parameters of ``model`` over all processes, gathered layer by layer when they are needed."""
    if world.size == 1:
        return
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # sums of many processes lose too much in bf16
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mp_policy=precision)
    # The root's own parameters (embedding, head) stay gathered between forward and backward, so the head may be used
    # outside the forward pass, as the losses do.
    fully_shard(model, reshard_after_forward=False, mp_policy=precision)


def let_go(model: nn.Module) -> None:
    """Forget what a forward pass without a backward left gathered; call it wherever weights are changed after one.

    Otherwise the next forward pass would find the old embedding and head, and take them for the present ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over the processes; all of them must ask.

    It lies on the CPU then, so that no card has to hold more than one such tensor beside its own share of all.
    """
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def spread_like(whole: Tensor, example: Tensor) -> Tensor:
    """The part of ``whole`` that this process holds, laid out as ``example`` is."""
    if not isinstance(example, DTensor):
        return whole.to(example.device)
    return distribute_tensor(whole.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def _communication_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
