"""Launchers of the kernels in ``kernels/batch_norm_act.py``: fused batch norm, residual addition and ReLU.

A forward pass in training launches three kernels (partial statistics, merge, apply), and so does a backward pass
(partial sums, merge, dx); a forward pass with running statistics launches one. No kernel uses atomics. The separate
passes are operators in :mod:`fused_res.backends.triton.batch_norm_sync`. Batch norm: Ioffe and Szegedy (2015),
https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from fused_res import ops
from fused_res.backends.reference import batch_norm_act as reference
from fused_res.backends.triton.batch_norm_sync import (
    NO_GRADS,
    ParameterGrads,
    activation_constexprs,
    backward_constexprs,
    compute_partials,
    compute_sums,
    dense_vector,
    dx_launch,
    merge_to_stats,
)
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.kernels.channel_vectors import update_running_stats_kernel
from fused_res.backends.triton.launch import Launch, Queue, queue_of
from fused_res.backends.triton.registration import register_operator
from fused_res.backends.triton.tiles import Tiling, accumulator_dtype, dense_tiling, in_layout_of
from fused_res.ops import stats_dtype
from fused_res.ops.checks import RELU_OR_IDENTITY, check_activation
from fused_res.ops.memory_format import is_channels_last, relu_mask_shape, restore_strides, to_memory_format

#: Running statistics, weight, bias and eps of a norm, from which the apply pass computes scale and shift.
_Running = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]


@register_operator
def batch_norm_stats(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> Tensor:
    x, tiling = dense_tiling(input)
    if training:
        return _batch_stats(x, tiling, queue_of(x), weight, bias, eps)
    stats = _new_stats(x, tiling)
    running = map(dense_vector, (running_mean, running_var, weight, bias))
    _fold_launch(tiling.channels, x.dtype, eps)(queue_of(x), stats, *running)
    return stats


def _batch_stats(
    x: Tensor, tiling: Tiling, queue: Queue | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return ``stats`` of the batch, of a dense tensor."""
    if not tiling.numel:
        return reference.batch_norm_stats(x, weight, bias, None, None, True, eps)
    return merge_to_stats(compute_partials(x, tiling, queue), weight, bias, eps, stats_dtype(x.dtype), queue)


def _new_stats(x: Tensor, tiling: Tiling) -> Tensor:
    channels = x.shape[1]
    return x.new_empty_strided((5, channels), (channels, 1), dtype=stats_dtype(x.dtype))


@lru_cache(maxsize=4096)
def _fold_launch(channels: int, dtype: torch.dtype, eps: float) -> Launch:
    block = 128
    scalars = channels, eps, accumulator_dtype(dtype), block
    return Launch(kernels.fold_kernel, (triton.cdiv(channels, block),), scalars)


@register_operator
def batch_norm_act_forward(
    input: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    save_mask: bool,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, tiling = dense_tiling(input)
    queue, running = queue_of(x), None
    if training:
        stats = _batch_stats(x, tiling, queue, weight, bias, eps)
    elif tiling.numel:
        stats, running = _new_stats(x, tiling), (running_mean, running_var, weight, bias, eps)
    else:
        stats = reference.batch_norm_stats(x, weight, bias, running_mean, running_var, False, eps)
    output = torch.empty_like(x)
    act = activation, negative_slope
    mask = _apply(x, tiling, queue, output, stats, residual, residual_stats, act, save_mask, running)
    return restore_strides(output, input, x), stats, mask


@register_operator
def batch_norm_act_apply(
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    activation: str,
    save_mask: bool,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor | None]:
    x, tiling = dense_tiling(input)
    output = torch.empty_like(x)
    act = activation, negative_slope
    mask = _apply(x, tiling, queue_of(x), output, stats, residual, residual_stats, act, save_mask, None)
    return restore_strides(output, input, x), mask


@register_operator
def batch_norm_act_inference_(
    input: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    negative_slope: float = 0.01,
) -> None:
    x, tiling = dense_tiling(input)
    running = running_mean, running_var, weight, bias, eps
    act = activation, negative_slope
    _apply(x, tiling, queue_of(x), x, None, residual, residual_stats, act, False, running)
    if x is not input:
        input.copy_(x)


def _apply(
    x: Tensor,
    tiling: Tiling,
    queue: Queue | None,
    output: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    act: tuple[str, float],
    save_mask: bool,
    running: _Running | None,
) -> Tensor | None:
    """Launch the apply pass into ``output``, and return the ReLU mask, or None if it is not to be saved.

    ``act`` is the activation and the slope of a leaky ReLU. If ``running`` is None, ``stats`` is an input. Otherwise
    the kernel computes scale and shift from the running statistics, and stores them in ``stats`` if that is not None.
    """
    if residual is not None or save_mask:
        check_activation(act[0], RELU_OR_IDENTITY, " with a residual or a ReLU mask")
    if not tiling.numel:
        return x.new_empty(relu_mask_shape(x), dtype=torch.uint8) if save_mask else None
    mask = x.new_empty(tiling.mask_shape, dtype=torch.uint8) if save_mask else None
    if residual is not None:
        residual = in_layout_of(residual, x, tiling)
    vectors: tuple[Tensor | None, ...] = (None, None, None, None)
    eps = 0.0
    if running is not None:
        *given, eps = running
        vectors = tuple(map(dense_vector, given))
    apply = _apply_launch(tiling, x.dtype, eps, activation_constexprs(*act), running is not None)
    apply(queue, x, output, residual, residual_stats, stats, *vectors, mask)
    return mask


@lru_cache(maxsize=4096)
def _apply_launch(tiling: Tiling, dtype: torch.dtype, eps: float, act: tuple[int, float], fold: bool) -> Launch:
    scalars = *tiling.extents, eps, *act, fold, *tiling.constexprs, accumulator_dtype(dtype)
    return Launch(kernels.apply_kernel, (tiling.tiles * tiling.blocks,), scalars, tiling.options)


@register_operator
def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    activation: str,
    output_mask: list[bool],
    negative_slope: float = 0.01,
) -> tuple[Tensor | None, ...]:
    flags = training, False, (activation, negative_slope), (*output_mask, False, False)
    return _backward(grad_output, input, weight, stats, None, None, None, relu_mask, *flags)[:4]


@register_operator
def batch_norm_act_backward_pair(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    residual: Tensor,
    residual_weight: Tensor | None,
    residual_stats: Tensor,
    relu_mask: Tensor | None,
    training: bool,
    residual_training: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    flags = training, residual_training, ("identity", 0.0), output_mask
    return _backward(grad_output, input, weight, stats, residual, residual_weight, residual_stats, relu_mask, *flags)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_stats: Tensor | None,
    relu_mask: Tensor | None,
    training: bool,
    residual_training: bool,
    act: tuple[str, float],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, tiling = dense_tiling(input)
    queue = queue_of(x)
    dy = in_layout_of(grad_output, x, tiling)
    residual_channels_last = tiling.channels_last
    if residual is not None:
        residual_channels_last = is_channels_last(residual)
        residual = in_layout_of(residual, x, tiling)
    grad_input, grad_residual, *parameters = output_mask
    constexprs = backward_constexprs(*act, relu_mask)
    sums: Tensor | None = None
    grads: ParameterGrads = NO_GRADS
    if True in parameters or (grad_input and training) or (grad_residual and residual_training):
        if True in parameters:
            likes = weight, weight, residual_weight, residual_weight
            w, b, rw, rb = [_vector(stats, t) if flag else None for flag, t in zip(parameters, likes, strict=True)]
            grads = w, b, rw, rb
        sums = compute_sums(dy, x, tiling, queue, stats, relu_mask, constexprs, residual, residual_stats, grads)
    dx = torch.empty_like(x) if grad_input else None
    dresidual = torch.empty_like(x) if grad_residual else None
    if (grad_input or grad_residual) and tiling.numel:
        count = tiling.numel // tiling.channels
        launch_dx = dx_launch(tiling, x.dtype, count, constexprs, training, residual_training)
        launch_dx(queue, dy, x, stats, residual, residual_stats, relu_mask, sums, dx, dresidual)
    return (
        None if dx is None else restore_strides(dx, input, x),
        None if dresidual is None else to_memory_format(dresidual, residual_channels_last),
        *grads,
    )


def _vector(stats: Tensor, weight: Tensor | None) -> Tensor:
    """Return an empty per-channel vector, of the dtype of ``weight``, or of ``stats`` without one."""
    channels = stats.shape[1]
    return (stats if weight is None else weight).new_empty_strided((channels,), (1,))


@register_operator
def add_masked_(self: Tensor, grad: Tensor, relu_mask: Tensor | None) -> None:
    """Add ``grad`` to ``self`` in place where the mask, in the memory format of ``grad``, is set."""
    dense, tiling = dense_tiling(grad)
    if not tiling.numel:
        return
    target = in_layout_of(self, dense, tiling)
    _add_masked_launch(tiling, grad.dtype)(queue_of(target), target, dense, relu_mask)
    if target is not self:
        self.copy_(target)


@lru_cache(maxsize=4096)
def _add_masked_launch(tiling: Tiling, dtype: torch.dtype) -> Launch:
    scalars = *tiling.extents, *tiling.constexprs, accumulator_dtype(dtype)
    return Launch(kernels.add_masked_kernel, (tiling.tiles * tiling.blocks,), scalars, tiling.options)


#: Norms that one launch updates.
_MAX_NORMS = 4


@register_operator
def update_running_stats(
    running_mean: list[Tensor], running_var: list[Tensor], stats: list[Tensor], momentum: list[float]
) -> None:
    """Update the running statistics of all norms of a block, four at a time."""
    # Scalar arguments of kernels are float32.
    if stats[0].dtype is torch.float64 or False in [r.is_contiguous() for r in (*running_mean, *running_var)]:
        reference.update_running_stats(running_mean, running_var, stats, momentum)
        return
    queue = queue_of(stats[0])
    for start in range(0, len(stats), _MAX_NORMS):
        norms = slice(start, start + _MAX_NORMS)
        means, variances, batch = running_mean[norms], running_var[norms], stats[norms]
        update = _update_launch(tuple([mean.shape for mean in means]), tuple(momentum[norms]))
        absent = (None,) * (_MAX_NORMS - len(means))
        update(queue, *means, *absent, *variances, *absent, *batch, *absent)


@lru_cache(maxsize=1024)
def _update_launch(shapes: tuple[tuple[int], ...], momentum: tuple[float, ...]) -> Launch:
    block, absent = 128, (0,) * (_MAX_NORMS - len(shapes))
    channels = [shape[0] for shape in shapes]
    decay, weight = [1.0 - value for value in momentum], map(float, momentum)
    scalars = *channels, *absent, *decay, *map(float, absent), *weight, *map(float, absent)
    grid = triton.cdiv(max(channels), block), len(channels)
    return Launch(update_running_stats_kernel, grid, (*scalars, ops.MEAN, ops.VAR, block))
