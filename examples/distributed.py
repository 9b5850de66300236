"""Single-process and torchrun-launched training: process group setup, collectives, DDP and FSDP2 wrapping."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def under_torchrun() -> bool:
    """Return whether torchrun, or a launcher with the same environment variables, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


class DistributedContext:
    """The rank, world size and collectives of a run. In a single process every collective returns its argument."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """All-reduce (sum) `values` in place and return them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process. Runs on the CPU to avoid a device synchronization."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, indexed by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, *modules: nn.Module | None) -> None:
        """Broadcast rank 0's buffers: each rank accumulates batch norm's running statistics over its own images."""
        if self.world_size > 1:
            for module in modules:
                for buffer in module.buffers() if module is not None else ():
                    dist.broadcast(buffer, src=0)


@contextmanager
def distributed_context(device: str) -> Iterator[DistributedContext]:
    """Initialize the process group under torchrun, and destroy it when the block ends.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for a GPU if there is one. Under torchrun, CUDA
            processes without an index use the GPU of their local rank.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if not under_torchrun():
        yield DistributedContext(chosen)
        return
    store, rank, world_size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On a single machine torchrun reuses one store over its restarts, which then still has the addresses of dead
        # processes: a rank that reads one before it is overwritten hangs. A prefix per restart separates them.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield DistributedContext(chosen)
    finally:
        # Objects that still refer to the group, such as DDP, would destroy it later while they hold the interpreter's
        # lock, which the group's threads wait for: a deadlock.
        gc.collect()
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: list[nn.Module], processes: DistributedContext) -> None:
    """Apply FSDP2 in place: shard parameters, gradients and optimizer state over the processes.

    Args:
        model: the model.
        blocks: submodules that are sharded as units of their own; the other parameters form one more unit.
        processes: the distributed context.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)


def wrap_ddp(model: nn.Module, processes: DistributedContext) -> nn.Module:
    """Wrap `model` in DDP, which averages its gradients over the processes."""
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(model: nn.Module, complete: bool) -> Iterator[None]:
    """Average gradients over the processes in this forward and backward pass only if `complete`.

    Args:
        model: a DDP or FSDP2 model, or any other module, for which this context does nothing.
        complete: whether this is the last accumulation step of a batch.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(complete)
        yield
    elif isinstance(model, DistributedDataParallel) and not complete:
        with model.no_sync():
            yield
    else:
        yield
