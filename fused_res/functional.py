"""Functional interface: validates the arguments and dispatches to a backend's kernels.

All functions support autocast, ``torch.compile`` and autograd, except :func:`conv_bias_act`, which is for inference.
Under ``torch.func`` transforms and forward-mode differentiation they run as plain PyTorch. Shapes are ``(N, C, ...)``;
per-channel vectors have shape ``(C,)``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from fused_res import _torch_compat, distributed
from fused_res.autograd.batch_norm_act import BatchNormAct, affine_stats
from fused_res.autograd.batch_norm_act import forward as batch_norm_act_forward
from fused_res.autograd.residual_block import ResidualBlock, opaque_residual_block
from fused_res.backends import registry
from fused_res.backends.reference import batch_norm_act as reference_norm
from fused_res.backends.reference import residual_block as reference_block
from fused_res.block.checks import check_recompute, check_tensors
from fused_res.block.plan import BlockConfig, Plan
from fused_res.block.planner import plan
from fused_res.dispatch import convolution
from fused_res.dispatch.backend import Kernels
from fused_res.ops import stats_dtype
from fused_res.ops.checks import (
    RELU_OR_IDENTITY,
    check_activation,
    check_convolution,
    check_input,
    check_momentum,
    check_negative_slope,
    check_norm,
    check_operands,
    check_residual,
)
from fused_res.ops.memory_format import is_channels_last
from fused_res.spec import BlockSpec, UnitTensors

__all__ = ["batch_norm_act", "conv_bias_act", "residual_block"]

#: The plan that each block ran last, keyed by its first weight; for inspection by users and benchmarks.
last_plan: MutableMapping[Any, Plan] = WeakTensorKeyDictionary()


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute ``activation(batch_norm(input) [+ residual])``; normalization, addition and activation are one pass.

    Equivalent to ``torch.nn.functional.batch_norm`` followed by an addition and an activation, with the same running
    statistics and gradients (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167). Backward recomputes the
    activation's input from ``input`` and the statistics instead of saving it. The result is rounded to
    ``input``'s dtype once, at the end. Statistics are computed in float32, in float64 for a float64 input. With
    ``residual_scale`` and ``residual_shift`` the added value is ``residual * residual_scale + residual_shift``.

    Args:
        input: tensor ``(N, C, ...)`` with 2 to 5 dimensions, float32, float64, bfloat16 or float16; any strides,
            without a copy if contiguous or channels_last.
        running_mean, running_var: running statistics ``(C,)``; updated in place if ``training``, required otherwise.
        weight, bias: scale and shift ``(C,)``, float32 or ``input``'s dtype; None means ones and zeros.
        residual: tensor of ``input``'s shape, dtype and device, in any memory format.
        training: whether to normalize with the statistics of the batch.
        momentum: weight of the new batch in the running statistics.
        eps: constant that is added to the variance; positive if ``training``.
        activation: ``"identity"``, ``"relu"``, ``"relu6"`` (https://arxiv.org/abs/1704.04861), ``"leaky_relu"`` or
            ``"silu"`` (https://arxiv.org/abs/1702.03118), with the values and derivatives of
            :mod:`torch.nn.functional`; with a residual, ``"identity"`` or ``"relu"``.
        negative_slope: slope of ``"leaky_relu"`` for negative values; other activations ignore it.
        residual_scale, residual_shift: per-channel scale and shift ``(C,)`` of the residual, float32 or ``input``'s
            dtype; both or neither, and only with a residual.
        process_group: process group whose processes share batch statistics; each calls this function with its shard of
            the batch, which may be empty. None: the statistics of this process only. Gradients of ``weight`` and
            ``bias`` are those of the local shard.
        backend: backend name, see :mod:`fused_res.backends`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        ValueError, TypeError: an argument is invalid; no tensor has been modified.
        BackendUnavailableError: the named backend is not available on this machine.
    """
    group = distributed.process_group_name(process_group) if training else ""
    check_norm(input, running_mean, running_var, weight, bias, training, not group, eps)
    check_residual(input, residual, residual_scale, residual_shift)
    check_momentum(momentum)
    if residual is None:
        check_activation(activation)
    else:
        check_activation(activation, RELU_OR_IDENTITY, " with a residual")
    check_negative_slope(negative_slope)
    kernels = registry.resolve(backend, input.device)
    tensors = (input, residual, weight, bias, residual_scale, residual_shift)
    if not _needs_reference():
        settings: tuple[Any, ...] = running_mean, running_var, training, momentum, eps, activation, negative_slope
        return run_norm(kernels, group, *tensors, *settings)
    _check_no_process_group(group)
    norm = input, running_mean, running_var, weight, bias, residual, training, eps, activation
    output, mean, var = reference_norm.batch_norm_act(*norm, residual_scale, residual_shift, negative_slope)
    if training and running_mean is not None and input.numel() and not is_recomputing():
        kernels.update_running_stats([running_mean], [running_var], [_mean_var_stats(mean, var)], [momentum])
    return output


def run_norm(
    kernels: Kernels,
    group: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Compute :func:`batch_norm_act` for a caller that has checked the arguments.

    Args:
        kernels: the backend's kernels.
        group: name of the process group, "" for none.
    """
    tensors = (input, residual, weight, bias, residual_scale, residual_shift)
    # Statistics that are updated below must not be operands: a compiler may repeat the operator in backward.
    mean, var = (None, None) if training else (running_mean, running_var)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        options = training, eps, activation, negative_slope, kernels.name, group
        output, stats = BatchNormAct.apply(*tensors, mean, var, *options)
    else:
        residual_stats = affine_stats(residual_scale, residual_shift, stats_dtype(input.dtype))
        output, stats, _ = batch_norm_act_forward(
            kernels, group, input, residual, residual_stats, weight, bias, mean, var, training, eps, activation, False,
            negative_slope,
        )  # fmt: skip
    if training and running_mean is not None and (input.numel() or group) and not is_recomputing():
        kernels.update_running_stats([running_mean], [running_var], [stats], [momentum])
    return output


def residual_block(
    input: Tensor,
    spec: BlockSpec,
    tensors: Sequence[Tensor | None],
    *,
    training: bool | Sequence[bool],
    momentum: float | Sequence[float] = 0.1,
    recompute: str = "none",
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
    tune: bool = False,
) -> Tensor:
    """Compute a residual block: a chain of conv-BN-act units plus an optional shortcut, as one autograd node.

    The result is ``activation(bn(conv(... input ...)) + shortcut(input))``, the residual block of He et al. (2015),
    https://arxiv.org/abs/1512.03385, with the units of ``spec``. Under autocast, ``input`` and the convolutions'
    tensors are cast as the stock modules would cast them; norms keep their float32 parameters. It can be captured in a
    CUDA graph, alone or in a whole training step (see :mod:`fused_res.backends.triton`), but tuning is not captured.

    Args:
        input: tensor ``(N, C, ...)``, float32, float64, bfloat16 or float16; channels_last is fastest.
        spec: the block's specification; its units have as many spatial dimensions as ``input``.
        tensors: flat list or tuple in the order of :meth:`fused_res.BlockSpec.tensor_names`. Each unit has its
            convolution's weight ``(K, C / groups, ...)``, float32 or ``input``'s dtype, and bias ``(K,)`` of
            ``input``'s dtype, and its norm's weight, bias, running mean and running variance, all ``(K,)``, float32 or
            ``input``'s dtype. The gradient of a float32 master weight is float32. All but the
            convolution's weight may be None, the running statistics only if ``training``, which updates them in place.
        training: whether norms use the statistics of the batch; one value, or one per unit (projection last).
        momentum: weight of the new batch in the running statistics; one value, or one per unit.
        recompute: recompute level. ``"none"`` saves everything that backward would otherwise recompute; ``"norm"``
            saves only the convolutions' raw outputs and recomputes the activations in backward; ``"conv"`` also
            recomputes a bottleneck's last 1x1 convolution and the projection's convolution.
        process_group: as in :func:`batch_norm_act`, for all units in training mode.
        backend: backend name, see :mod:`fused_res.backends`.
        tune: whether to select algorithms by measurement: on the first call with a shape, the backend's algorithms for
            each convolution are timed and the fastest is selected.

    Returns:
        The block's output ``(N, K, ...)``, of ``input``'s dtype, or of autocast's dtype under autocast.

    Raises:
        ValueError, TypeError: an argument is invalid; no tensor has been modified.
        BackendUnavailableError: the named backend is not available on this machine.
    """
    check_input(input)
    if not isinstance(spec, BlockSpec):
        raise TypeError(f"spec must be a fused_res.BlockSpec, got {type(spec).__name__}")
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"tensors must be a list or tuple, got {type(tensors).__name__}")
    batch_statistics = spec.per_unit(training, "training")
    if batch_statistics.count(True) + batch_statistics.count(False) != len(batch_statistics):
        raise TypeError(f"training must be True or False, or one of them per unit, got {training!r}")
    momenta = spec.per_unit(momentum, "momentum") if True in batch_statistics else ()
    for value in momenta:
        check_momentum(value)
    if process_group is not None:
        distributed.check_group(process_group)
    return run_block(input, spec, tensors, batch_statistics, momenta, recompute, process_group, backend, tune)[0]


def run_block(
    input: Tensor,
    spec: BlockSpec,
    tensors: Sequence[Tensor | None],
    training: tuple[bool, ...],
    momentum: Sequence[float],
    recompute: str,
    process_group: ProcessGroup | None,
    backend: str,
    tune: bool,
    opaque: bool | None = None,
) -> tuple[Tensor, Plan | None]:
    """Compute :func:`residual_block` for a caller that has checked the types of the arguments.

    Args:
        opaque: whether to call the opaque operators, for a compiler that traces this function. None: where
            ``torch.compiler.is_compiling()``, which a backend of Dynamo and AOTAutograd cannot rely on.
        training: for each unit, whether it uses the statistics of the batch.
        momentum: for each unit, the weight of the new batch; empty if no unit uses the statistics of the batch.
        input, spec, tensors, recompute, process_group, backend, tune: as of :func:`residual_block`.

    Returns:
        The output, and the plan that computed it; None under compilation and ``torch.func`` transforms.
    """
    check_recompute(recompute)
    any_training = True in training
    group = distributed.process_group_name(process_group) if process_group is not None and any_training else ""
    kernels = registry.resolve(backend, input.device)
    first_weight, dtype = tensors[0] if tensors else None, autocast_dtype(input)
    compiling = torch.compiler.is_compiling() if opaque is None else opaque
    if dtype is not None or compiling:  # otherwise planning detects non-tensors at no extra cost
        check_tensors(spec, tensors)
    if dtype is not None and input.dtype != torch.float64:  # autocast does not cast float64
        input, tensors = input.to(dtype), list(tensors)
        for index in range(0, len(tensors), len(UnitTensors._fields)):
            weight, bias = tensors[index : index + 2]
            # The plan casts float32 weights where an algorithm does not pack them itself.
            if weight is not None and weight.dtype != torch.float32:
                tensors[index] = weight.to(dtype)
            tensors[index + 1] = None if bias is None else bias.to(dtype)

    preference = registry.conv_preference()
    config = BlockConfig(spec, training, kernels.name, recompute, preference, group)
    stats: Sequence[Any]
    block_plan: Plan | None = None
    if not compiling and _torch_compat.is_transformed():
        _check_no_process_group(group)
        plan(config, input, tensors)
        output, means, variances = reference_block.residual_block(input, spec, tensors, training)
        stats = [*map(_mean_var_stats, means, variances)]
    elif compiling:
        output, stats = opaque_residual_block(config, input, tensors)
    else:
        block_plan = plan(config, input, tensors)
        if tune and preference == "planned":
            from fused_res.dispatch import tuning

            tuned_algorithms = (
                tuning.tuned_training_algorithms(
                    kernels, unit.problem, unit.input_name != "x", unit.training, input.device
                )
                for unit in block_plan.all_units
            )
            block_plan = plan(config, input, tensors, None, tuple(tuned_algorithms))
        output, stats = _run_plan(block_plan, kernels, input, tensors)
        _record_plan(first_weight, block_plan)

    if any_training and (group or output.numel()) and not is_recomputing():
        _update_running_stats(kernels, tensors, training, momentum, stats)
    return output, block_plan


def run_planned_block(
    block_plan: Plan, kernels: Kernels, tensors: Sequence[Tensor | None], momentum: Sequence[float], input: Tensor
) -> Tensor:
    """Compute :func:`run_block` with the plan of an earlier call for tensors with the same metadata, in one process."""
    output, stats = _run_plan(block_plan, kernels, input, tensors)
    _record_plan(tensors[0], block_plan)
    training = block_plan.config.training
    if True in training and output.numel() and not is_recomputing():
        _update_running_stats(kernels, tensors, training, momentum, stats)
    return output


def _run_plan(
    block_plan: Plan, kernels: Kernels, input: Tensor, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, Sequence[Any]]:
    """Return the output of a planned block, and the batch norm statistics of every unit."""
    if block_plan.needs_backward:
        operands = _torch_compat.unwrap_dead_wrappers((input, *tensors))
        differentiable = [operands[index] for index in block_plan.differentiable]
        arguments = block_plan, kernels, operands, *differentiable
        output, *stats = _torch_compat.apply_function(ResidualBlock, *arguments)
        return output, stats
    slots: list[Any] = block_plan.run_forward(kernels, input, tensors)
    output, *stats = (slots[slot] for slot in (*block_plan.forward.results, *block_plan.stats_slots))
    return output, stats


def _update_running_stats(
    kernels: Kernels,
    tensors: Sequence[Tensor | None],
    training: Sequence[bool],
    momentum: Sequence[float],
    stats: Sequence[Any],
) -> None:
    """Update the running statistics of the units that use the statistics of the batch.

    Args:
        tensors, training, momentum: as of :func:`run_block`.
        stats: batch norm statistics of every unit.
    """
    running: list[tuple[Any, Any, Tensor, float]] = []
    for index, first in enumerate(range(_RUNNING_MEAN, len(tensors), len(UnitTensors._fields))):
        running_mean = tensors[first]
        if running_mean is not None and training[index]:
            running.append((running_mean, tensors[first + 1], stats[index], momentum[index]))
    if running:
        kernels.update_running_stats(*map(list, zip(*running, strict=True)))


#: id of a weight -> a reference to it and the plan recorded in `last_plan`, whose own look-up takes ten times as long.
_recorded: dict[int, tuple[Callable[[], Any], Plan]] = {}


def _record_plan(weight: Any, block_plan: Plan) -> None:
    """Set ``last_plan[weight]``."""
    reference, recorded = _recorded.get(id(weight), (None, None))
    if recorded is block_plan and reference is not None and reference() is weight:
        return
    last_plan[weight] = block_plan
    key = id(weight)
    _recorded[key] = weakref.ref(weight, lambda _: _recorded.pop(key, None)), block_plan


_RUNNING_MEAN = UnitTensors._fields.index("running_mean")


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "relu",
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute ``activation(conv(input, weight) + bias [+ residual])`` as one kernel, for inference.

    With every batch norm folded into its convolution's ``weight`` and ``bias``, a trained residual network consists of
    these operations; :func:`fused_res.freeze` folds the norms. Under autocast the arguments are cast as those of
    :func:`torch.nn.functional.conv2d`.

    Args:
        input: tensor ``(N, C, ...)`` with 3 to 5 dimensions, float32, float64, bfloat16 or float16; channels_last is
            fastest.
        weight: filter ``(K, C / groups, ...)``, of ``input``'s dtype.
        bias: bias ``(K,)``, of ``input``'s dtype.
        residual: tensor of the output's shape and ``input``'s dtype, in any memory format.
        stride, dilation: one integer, or one per spatial dimension.
        padding: one integer, or one per spatial dimension, or ``"valid"``, or ``"same"`` if that is the same padding on
            both sides.
        groups: number of convolution groups.
        activation: ``"relu"`` or ``"identity"``.
        backend: backend name, see :mod:`fused_res.backends`.

    Returns:
        A tensor of ``input``'s dtype, channels_last if ``input`` or ``weight`` is.

    Raises:
        RuntimeError: grad mode is enabled and an argument requires a gradient.
        ValueError, TypeError: an argument is invalid.
        BackendUnavailableError: the named backend is not available on this machine.
    """
    check_input(input)
    check_activation(activation, RELU_OR_IDENTITY)
    if (dtype := autocast_dtype(input)) is not None:
        check_operands(weight, bias, residual)
        input, weight, bias, residual = (_autocast(t, dtype) for t in (input, weight, bias, residual))
    geometry = (*check_convolution(input, weight, bias, residual, stride, padding, dilation, groups), groups)
    if torch.is_grad_enabled():
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"conv_bias_act is for inference, but {name} requires a gradient: call it under"
                    " torch.inference_mode() or torch.no_grad(), or train with separate convolution and batch norm"
                )
    kernels = registry.resolve(backend, input.device)
    preference, relu = registry.conv_preference(), activation == "relu"
    # The arguments are cast already; autocast must not cast the float32 intermediates of the reference.
    with torch.autocast(input.device.type, enabled=False) if dtype is not None else contextlib.nullcontext():
        if _needs_reference():
            reference = registry.resolve("reference", input.device)
            return reference.conv_bias_act(input, weight, bias, residual, *geometry, relu)
        if torch.compiler.is_compiling():
            channels_last, has_residual = is_channels_last(input), residual is not None
            if registry.selects_aten(
                kernels, tuple(weight.shape), geometry, input.dtype, channels_last, has_residual, preference
            ):
                return convolution.aten_conv_bias_act(input, weight, bias, residual, geometry, relu)
            return kernels.conv_bias_act(input, weight, bias, residual, *geometry, relu)
        return registry.dispatch_conv_bias_act(kernels, input, weight, bias, residual, geometry, relu, preference)


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts to; None if autocast is disabled, or for meta tensors, which have none."""
    device = "cpu" if input.is_cpu else input.device.type
    return torch.get_autocast_dtype(device) if not input.is_meta and torch.is_autocast_enabled(device) else None


def _autocast(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def is_recomputing() -> bool:
    """Return whether this code runs inside backward, which means that activation checkpointing recomputes a forward.

    The original forward has already updated running statistics and batch counters with this batch.
    """
    return not torch.compiler.is_compiling() and _torch_compat.is_in_backward()


def _needs_reference() -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation is active.

    The kernels do not support these: the caller runs the plain PyTorch implementation.
    """
    if torch.compiler.is_compiling():
        return False
    return _torch_compat.is_transformed()


def _mean_var_stats(mean: Tensor, var: Tensor) -> Tensor:
    """Return ``stats`` for ``update_running_stats``, which reads the rows MEAN and VAR only; the others are filler."""
    return torch.stack((mean, mean, mean, mean, var))


def _check_no_process_group(group: str) -> None:
    """Raise RuntimeError for a process group: plain PyTorch computes local statistics only."""
    if group:
        raise RuntimeError("process_group: not supported under torch.func transforms and forward-mode differentiation")
