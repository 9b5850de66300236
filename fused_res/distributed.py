"""Collectives of synchronized batch norm: all-gather of partial statistics in forward, all-reduce of sums in backward.

Forward gathers the partial statistics (count, mean, M2) of every process's shard of the batch, which are then merged
(Chan, Golub, LeVeque 1979). Backward adds the reductions of the gradient. Either transfers O(C) numbers, whatever the
batch size. Any backend of ``torch.distributed`` is supported, including gloo on the CPU and NCCL. Groups are passed by
name, because operators accept no Python objects; the empty name means no group.
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


def multi_process_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """Return ``group``, or the default group for None; return None if the group has only this process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def process_group_name(group: ProcessGroup | None) -> str:
    """Return the name of a group with more than one process, "" otherwise.

    The name is "" for None, for a group of one process, and in a process that is not a member of the group.

    Raises:
        TypeError: ``group`` is not a process group.
    """
    if isinstance(group, ProcessGroup):
        return "" if dist.get_world_size(group) < 2 else group.group_name
    check_group(group)
    return ""


def check_group(group: ProcessGroup | None) -> None:
    """Raise TypeError unless ``group`` is a process group, None, or torch's placeholder in non-member processes."""
    if not (group is None or isinstance(group, ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")


def _gather_partials(partials: Tensor, group: str) -> Tensor:
    processes = resolve_process_group(group)
    local = partials if partials.shape[0] == 1 else merge_partials(partials)
    gathered = local.new_empty((processes.size(), *local.shape[1:]))
    all_gather_single(gathered, local.contiguous(), processes)
    if gathered.is_cpu and gathered.shape[2] and not gathered[:, 0, 0].any():
        raise ValueError("input must not be empty in every process of the group: batch statistics need values")
    return gathered


def _total_sums(sums: Tensor, count: int, group: str) -> Tensor:
    reduced = torch.cat((sums.flatten(), sums.new_full((1,), count)))
    dist.all_reduce(reduced, group=resolve_process_group(group))
    return reduced[:-1].view_as(sums) * (count / reduced[-1])


#: Partial statistics ``(P, 3, C)`` of the P processes, in rank order; the input of ``merge_stats``.
gather_partials = ops.register_python_operator(
    "fused_res_distributed", "gather_partials", _gather_partials, "CPU", "CUDA"
)
#: The sums over all processes, scaled by the local share ``count / total count``: a kernel that divides by the local
#: ``count``, as in single-process training, then computes the mean over the values of all processes.
total_sums = ops.register_python_operator("fused_res_distributed", "total_sums", _total_sums, "CPU", "CUDA")
