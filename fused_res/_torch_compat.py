"""Wrappers for all private and version-dependent PyTorch APIs that fused_res uses.

The supported versions of torch are those of the dependency in ``pyproject.toml``. ``make gpu-env`` tests the oldest,
``requirements/gpu.txt``, and ``make test`` the newest, ``requirements/dev.txt``.

No other module of the package calls a private function of torch. Attributes of tensors and modules (``_version``,
``_modules``, ``_forward_hooks``, ...) are the exception.
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

# Dispatch modes, transforms, tracers and hooks


def has_torch_dispatch_mode() -> bool:
    """Return whether a ``__torch_dispatch__`` mode (fake tensors, a FLOP counter, ...) intercepts every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation is active."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_functorch_active() -> bool:
    """Return whether a ``torch.func`` transform is active."""
    return bool(torch._C._are_functorch_transforms_active())


def is_exporting() -> bool:
    """Return whether ``torch.export`` is active.

    Under ``torch.compile``, torch 2.11 evaluates ``torch.compiler.is_exporting()`` to True.
    """
    return torch.compiler._is_exporting_flag


def is_jit_tracing() -> bool:
    """Return whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def is_fx_proxy(value: object) -> bool:
    """Return whether ``value`` is a ``torch.fx`` proxy, which exists only during ``torch.fx.symbolic_trace``."""
    return isinstance(value, torch.fx.Proxy)


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)`` where no ``torch.func`` transform is active.

    It omits what ``apply`` does for transforms; :func:`unwrap_dead_wrappers` is the part that matters without one.
    """
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def is_functorch_wrapper(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has the wrapper of a ``torch.func`` transform, which may have ended."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def unwrap_dead_wrappers(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the tensors, those that were returned from inside a ``torch.func`` transform without their wrapper."""
    unwrap = torch._C._functorch.unwrap_if_dead
    return tuple([t if t is None else unwrap(t) for t in tensors])


def metadata_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function of tensors that returns whether their metadata equals that of ``tensors``.

    It compares Python type, shape, strides, dtype, device, layout and requires_grad, as Dynamo's guards do, in a tenth
    of the time that it takes to read them in Python. It returns False under another dispatch mode, autocast state or
    inference mode.
    """
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guards.check
    return check


def is_in_backward() -> bool:
    """Return whether autograd's engine runs this code."""
    return torch._C._current_graph_task_id() != -1


def has_global_module_hooks() -> bool:
    """Return whether a global hook, which applies to all modules, is registered."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def assume_constant_result(function: F) -> F:
    """Mark a function whose result Dynamo treats as a constant, evaluated once per trace from constant arguments.

    ``torch.compiler.assume_constant_result`` does the same, but imports Dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compile_with_inductor(module: torch.fx.GraphModule, inputs: Sequence[Tensor], mode: str | None) -> Any:
    """Return what ``torch.compile`` with Inductor, and a ``mode`` or None, runs for a graph of Dynamo."""
    from torch import _inductor
    from torch._inductor.compile_fx import compile_fx

    options = _inductor.list_mode_options(mode) if mode is not None else None
    return compile_fx(module, inputs, config_patches=options)


def is_registered_operator(target: object) -> bool:
    """Return whether a function of an ``fx`` graph is an operator of ``torch.ops``, of any library."""
    return isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator))


def may_mutate(operator: Any) -> bool:
    """Return whether an operator may write to its arguments, by its schema where it has a single one."""
    return not isinstance(operator, torch._ops.OpOverload) or bool(operator._schema.is_mutable)


def concrete_number(value: object) -> object:
    """Return a symbolic number that has only one possible value as that value; anything else unchanged."""
    if isinstance(value, torch.SymInt):
        known = value.node.maybe_as_int()
    elif isinstance(value, torch.SymFloat):
        known = value.node.maybe_as_float()
    else:
        return value
    return value if known is None else known


def copy_to_new(new: Tensor, source: Tensor) -> Tensor:
    """Return ``new``, an uninitialized tensor that nothing else refers to, with the values of ``source``.

    If an autograd Function that is compiled writes in place to a new tensor in its forward, and returns it, torch 2.11
    computes gradients of zero: its backward receives zeros instead of the gradient of the output.
    """
    return torch.ops.aten.copy(new, source) if torch.compiler.is_compiling() else new.copy_(source)


# Distributed


def resolve_process_group(name: str) -> ProcessGroup:
    """Return the process group with this name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def all_gather_single(output: Tensor, input: Tensor, group: ProcessGroup) -> None:
    """All-gather equally shaped tensors into one; before torch 2.13 the name was ``all_gather_into_tensor``."""
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(output, input, group=group)


# Multi-tensor (foreach) kernels


def foreach_add_(tensors: list[Tensor], number: float) -> None:
    """Add a number to every tensor in place."""
    torch._foreach_add_(tensors, number)


def foreach_lerp_(running: list[Tensor], new: list[Tensor], momentum: Sequence[float]) -> None:
    """Compute ``running = (1 - momentum) * running + momentum * new`` in place, with one momentum per tensor."""
    torch._foreach_mul_(running, [1 - weight for weight in momentum])
    torch._foreach_add_(running, torch._foreach_mul(new, [*momentum]))


# oneDNN, which PyTorch calls mkldnn


def mkldnn_enabled() -> bool:
    """Return whether ``torch.backends.mkldnn`` is enabled."""
    return bool(torch._C._get_mkldnn_enabled())


def mkldnn_supports_bf16() -> bool:
    """Return whether oneDNN supports bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mkldnn_supports_bf16_depthwise_volumes() -> bool:
    """Return whether oneDNN computes bfloat16 convolutions of volumes with one channel per group.

    That of torch 2.11, oneDNN 3.10.2, leaves the output uninitialized if the volume has depth 1 and padding in depth;
    that of torch 2.13, oneDNN 3.12.0, does not.
    """
    return torch.__version__ >= "2.13"


def mkldnn_supports_fp16() -> bool:
    """Return whether oneDNN supports float16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def mkldnn_reorder_weight(weight: Tensor, geometry: _Geometry, input_size: Sequence[int]) -> Tensor:
    """Return ``weight`` reordered to oneDNN's blocked memory format for an input of this size."""
    stride, padding, dilation, groups = geometry
    reorder = torch.ops.mkldnn._reorder_convolution_weight.default
    return reorder(weight, padding, stride, dilation, groups, list(input_size))


def mkldnn_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, activation: str
) -> Tensor:
    """Run oneDNN's convolution with ``activation``, ``"relu"`` or ``"none"``, in its epilogue."""
    stride, padding, dilation, groups = geometry
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    return convolve(input, weight, bias, padding, stride, dilation, groups, activation, [], None)
