"""Every private or version-dependent name of PyTorch that fused_res uses, for torch 2.11 and newer.

What each stands for is said here; nothing else in the package refers to an underscore of torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils._pytree import tree_map_only

__all__ = ["BatchNorm", "FakeTensor", "FakeTensorMode", "NormBase", "tree_map_only"]

#: Stride, padding, dilation and groups.
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]

F = TypeVar("F", bound=Callable[..., Any])

# What observes or transforms the computation


def is_observed() -> bool:
    """Whether a dispatch mode (fake tensors, a FLOP counter, a profiler of operators) sees every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is active."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_functorch() -> bool:
    """Whether a ``torch.func`` transform is active."""
    return bool(torch._C._are_functorch_transforms_active())


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` records the call."""
    return torch._C._get_tracing_state() is not None


def is_fx_proxy(value: object) -> bool:
    """Whether ``torch.fx.symbolic_trace`` records the call."""
    return isinstance(value, torch.fx.Proxy)


def is_in_backward() -> bool:
    """Whether autograd's engine runs this code."""
    return torch._C._current_graph_task_id() != -1


def has_global_module_hooks() -> bool:
    """Whether a hook is registered on all modules."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def constant_while_compiling(function: F) -> F:
    """Marks a function whose result Dynamo takes as a constant, computed once a trace from constant arguments.

    ``torch.compiler.assume_constant_result`` does this, and imports Dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Distributed


def resolve_process_group(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def all_gather_single(output: Tensor, input: Tensor, group: ProcessGroup) -> None:
    """Gathers equal tensors into one; before torch 2.13 it was called ``all_gather_into_tensor``."""
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(output, input, group=group)


# Foreach kernels, which optimizers use


def add_in_place(tensors: list[Tensor], number: float) -> None:
    torch._foreach_add_(tensors, number)


def average_in_place(running: list[Tensor], new: list[Tensor], momentum: Sequence[float]) -> None:
    """``running = (1 - momentum) * running + momentum * new``, tensor by tensor."""
    torch._foreach_mul_(running, [1 - weight for weight in momentum])
    torch._foreach_add_(running, torch._foreach_mul(new, [*momentum]))


# oneDNN, which PyTorch calls mkldnn


def mkldnn_enabled() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


def mkldnn_computes_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mkldnn_computes_fp16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def mkldnn_reorder_weight(weight: Tensor, geometry: _Geometry, input_size: Sequence[int]) -> Tensor:
    """``weight`` in oneDNN's blocked format for an input of this size."""
    stride, padding, dilation, groups = geometry
    reorder = torch.ops.mkldnn._reorder_convolution_weight.default
    return reorder(weight, padding, stride, dilation, groups, list(input_size))


def mkldnn_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, activation: str
) -> Tensor:
    """A convolution with ``activation``, ``"relu"`` or ``"none"``, in its epilogue."""
    stride, padding, dilation, groups = geometry
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    return convolve(input, weight, bias, padding, stride, dilation, groups, activation, [], None)
