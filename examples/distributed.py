"""The processes of a training run: one by itself, or those that torchrun started, which have to act alike."""

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
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


class Processes:
    """Which of how many processes this is, and what they agree on. By itself, every method gives back its argument."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process. By way of the CPU, so that no device has to be waited for."""
        if self.world == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def of_first(self, value: T) -> T:
        """The first process's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, *modules: nn.Module | None) -> None:
        """Gives all processes the first one's running statistics, which each counts over its own images."""
        if self.world > 1:
            for module in modules:
                for buffer in module.buffers() if module is not None else ():
                    dist.broadcast(buffer, src=0)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the others under torchrun, and leaves them in the end.

    Args: device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``, a GPU where there is one; under torchrun each
    process of a machine has a GPU of its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if not under_torchrun():
        yield Processes(chosen)
        return
    store, rank, world = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On a single machine torchrun keeps one store over its restarts, and with it the addresses of processes that
        # are dead: whoever reads one before it is overwritten waits in vain.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Processes(chosen)
    finally:
        # What still holds the group, as DDP does, would end it later, holding the interpreter's lock that the group's
        # threads wait for.
        gc.collect()
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: list[nn.Module], processes: Processes) -> None:
    """FSDP2, in place: parameters, gradients and optimizer state of each block, and of what is around them, are split
    over the processes."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """DDP around `model`: its gradients are averaged over the processes."""
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextmanager
def gradients(model: nn.Module, complete: bool) -> Iterator[None]:
    """Around a forward and backward: averages gradients over the processes only if they are `complete` with it."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(complete)
        yield
    elif isinstance(model, DistributedDataParallel) and not complete:
        with model.no_sync():
            yield
    else:
        yield
