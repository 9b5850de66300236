"""What several processes tell each other between the halves of a batch norm.

Forward, each sends the count, mean and M2 of its part of the batch, and gets everybody's; backward, its sums of the
gradient, and gets the total: O(C) numbers each way, however large the batch. Any backend of ``torch.distributed`` will
do, gloo on the CPU as well as NCCL. Groups travel by name, because the operators that ``torch.compile`` sees take no
objects; the empty name stands for no group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fused_res import ops
from fused_res._torch_compat import all_gather_single, resolve_process_group
from fused_res.backends.reference.batch_norm_sync import merge_partials


def _size(group: str) -> int:
    return resolve_process_group(group).size()


ops.define(
    "fused_res_distributed",
    {
        "gather_partials": "(Tensor partials, str group) -> Tensor",
        "total_sums": "(Tensor sums, int count, str group) -> Tensor",
    },
    {
        "gather_partials": lambda a: a.partials.new_empty((_size(a.group), *a.partials.shape[1:])),
        "total_sums": lambda a: torch.empty_like(a.sums),
    },
)


def others(group: ProcessGroup | None) -> ProcessGroup | None:
    """``group``, or for None the group of all processes; None where that is this process alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def name_of(group: ProcessGroup | None) -> str:
    """Empty for None, a group of one, and in the processes that a group leaves out; raises TypeError for no group."""
    if isinstance(group, ProcessGroup):
        return "" if dist.get_world_size(group) < 2 else group.group_name
    check_group(group)
    return ""


def check_group(group: ProcessGroup | None) -> None:
    """Raises TypeError unless it is a group, None, or what stands for one in the processes that it leaves out."""
    if not (group is None or isinstance(group, ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")


def _gather_partials(partials: Tensor, group: str) -> Tensor:
    processes = resolve_process_group(group)
    own = partials if partials.shape[0] == 1 else merge_partials(partials)
    everyones = own.new_empty((processes.size(), *own.shape[1:]))
    all_gather_single(everyones, own.contiguous(), processes)
    if everyones.is_cpu and everyones.shape[2] and not everyones[:, 0, 0].any():
        raise ValueError("input is empty in every process of the group: there is nothing to take statistics of")
    return everyones


def _total_sums(sums: Tensor, count: int, group: str) -> Tensor:
    told = torch.cat((sums.flatten(), sums.new_full((1,), count)))
    dist.all_reduce(told, group=resolve_process_group(group))
    return told[:-1].view_as(sums) * (count / told[-1])


#: Partials ``(P, 3, C)`` of every process, one part each, in the order of their ranks: for ``merge_stats``.
gather_partials = ops.operator("fused_res_distributed", "gather_partials", _gather_partials, "CPU", "CUDA")
#: The sums of all processes, scaled by this one's share of all values: a kernel that divides by this one's ``count``,
#: as for a batch of its own, then has the mean over everybody's.
total_sums = ops.operator("fused_res_distributed", "total_sums", _total_sums, "CPU", "CUDA")
