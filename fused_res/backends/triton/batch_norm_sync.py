"""Launchers of batch norm's passes as separate operators: statistics and their merge, backward reductions, and dx.

Between the passes, synchronized batch norm combines the partial statistics of all ranks. The variances are merged by
the parallel algorithm of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from fused_res.backends.reference import batch_norm_sync as reference
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.kernels.channel_vectors import merge_norm_sums_kernel
from fused_res.backends.triton.launch import Launch, Queue, launch, queue_of
from fused_res.backends.triton.registration import register_operator
from fused_res.backends.triton.tiles import Tiling, accumulator_dtype, dense_tiling, in_layout_of
from fused_res.ops import stats_dtype
from fused_res.ops.checks import ACTIVATIONS, RELU_OR_IDENTITY, check_activation

#: Maximum number of partial statistics that one program merges; more, as from a convolution's tiles, are merged in
#: groups first.
_MAX_PARTIALS = 2048
_MIN_GROUP = 64
#: The loop over parts is bound by the latency of its loads: many parts a step, and a sector of channels.
_BLOCK_PARTS, _BLOCK_CHANNELS = 256, 8
#: Gradients of a norm's weight and bias, then those of the residual's norm; None where not requested.
ParameterGrads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_GRADS: ParameterGrads = (None, None, None, None)


@register_operator
def batch_norm_partials(input: Tensor) -> Tensor:
    x, tiling = dense_tiling(input)
    if not tiling.numel:
        return reference.batch_norm_partials(x)
    return merge_partial_stats(compute_partials(x, tiling, queue_of(x)))


def compute_partials(x: Tensor, tiling: Tiling, queue: Queue | None) -> Tensor:
    """Compute the partial statistics of a dense, non-empty tensor in one pass.

    Returns:
        ``(parts, 4, C)`` in the accumulation dtype: count, high part of the mean, M2, and low part of the mean. The
        mean is high + low: where a channel's values are nearly equal, the rounding error of the high part alone is not
        small compared with their deviation.
    """
    shape, strides = (tiling.parts, 4, tiling.channels), (4 * tiling.channels, tiling.channels, 1)
    # With strides given, an allocation takes two thirds of the time.
    partials = x.new_empty_strided(shape, strides, dtype=stats_dtype(x.dtype))
    _partials_launch(tiling, x.dtype)(queue, x, partials)
    return partials


@lru_cache(maxsize=4096)
def _partials_launch(tiling: Tiling, dtype: torch.dtype) -> Launch:
    scalars = *tiling.extents, tiling.tiles, tiling.tiles_per_part, *tiling.constexprs, accumulator_dtype(dtype)
    return Launch(kernels.partials_kernel, (tiling.parts * tiling.blocks,), scalars, tiling.options)


def _merge_group_size(parts: int) -> int:
    """Return how many partials a program merges; the second dimension of a grid is at most 65535."""
    return parts if parts <= _MAX_PARTIALS else max(_MIN_GROUP, triton.cdiv(parts, 65535))


@lru_cache(maxsize=4096)
def _merge_launch(parts: int, rows: int, channels: int, eps: float, final: bool) -> Launch:
    group_size = parts if final else _merge_group_size(parts)
    grid = triton.cdiv(channels, _BLOCK_CHANNELS), triton.cdiv(parts, group_size)
    scalars = parts, group_size, channels, eps, final, rows, _BLOCK_PARTS, _BLOCK_CHANNELS
    return Launch(kernels.merge_partials_kernel, grid, scalars)


def merge_partial_stats(partials: Tensor, max_partials: int = 1) -> Tensor:
    """Merge partial statistics, in float64, until at most ``max_partials`` are left.

    Args:
        partials: ``(parts, 3 or 4, C)``: count, mean, M2, and optionally the low part of the mean.
        max_partials: largest first dimension of the result. Default: 1.

    Returns:
        float64 ``(parts, 3, C)``.
    """
    while partials.shape[0] > max_partials or partials.shape[1] == 4:
        parts, rows, channels = partials.shape
        merge = _merge_launch(parts, rows, channels, 0.0, False)
        merged = partials.new_empty((merge.grid[1], 3, channels), dtype=torch.float64)
        merge(queue_of(partials), partials, merged, None, None)
        partials = merged
    return partials.double()


@register_operator
def merge_stats(partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool) -> Tensor:
    if partials.shape[0] > _MAX_PARTIALS:
        partials = merge_partial_stats(partials, _MAX_PARTIALS)
    dtype = torch.float64 if double else torch.float32
    return merge_to_stats(partials.contiguous(), weight, bias, eps, dtype, queue_of(partials))


def merge_to_stats(
    partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, queue: Queue | None
) -> Tensor:
    """Return ``stats`` of this dtype from at most ``_MAX_PARTIALS`` contiguous partial statistics."""
    parts, rows, channels = partials.shape
    stats = partials.new_empty_strided((5, channels), (channels, 1), dtype=dtype)
    _merge_launch(parts, rows, channels, eps, True)(queue, partials, stats, dense_vector(weight), dense_vector(bias))
    return stats


def dense_vector(vector: Tensor | None) -> Tensor | None:
    """Return a per-channel vector without gaps in memory, which kernels require: it may be a column or an expansion."""
    return None if vector is None else vector.contiguous()


def activation_constexprs(activation: str, negative_slope: float) -> tuple[int, float]:
    """Return ``ACTIVATION`` and ``SLOPE`` of a kernel; the slope is 0 for activations that do not read it."""
    check_activation(activation)
    return ACTIVATIONS.index(activation), negative_slope if activation == "leaky_relu" else 0.0


def backward_constexprs(activation: str, negative_slope: float, relu_mask: Tensor | None) -> tuple[int, float]:
    """Return :func:`activation_constexprs` for a backward kernel, after a check against the mask."""
    if relu_mask is not None:
        check_activation(activation, RELU_OR_IDENTITY, " with a ReLU mask")
    return activation_constexprs(activation, negative_slope)


@register_operator
def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    activation: str,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    negative_slope: float = 0.01,
) -> Tensor:
    act = backward_constexprs(activation, negative_slope, relu_mask)
    if residual is not None:
        check_activation(activation, RELU_OR_IDENTITY, " with a residual")
    x, tiling = dense_tiling(input)
    dy = in_layout_of(grad_output, x, tiling)
    if residual is not None:
        residual = in_layout_of(residual, x, tiling)
    return compute_sums(dy, x, tiling, queue_of(x), stats, relu_mask, act, residual, residual_stats, NO_GRADS)[0]


def compute_sums(
    dy: Tensor,
    x: Tensor,
    tiling: Tiling,
    queue: Queue | None,
    stats: Tensor,
    relu_mask: Tensor | None,
    act: tuple[int, float],
    residual: Tensor | None,
    residual_stats: Tensor | None,
    parameter_grads: ParameterGrads,
) -> Tensor:
    """Compute the operator ``batch_norm_sums`` on tensors of one dense layout; also write the parameters' gradients.

    ``act`` is as of :func:`backward_constexprs`.

    Returns:
        ``(parts, rows, C)``, whose first entry are the sums; the others are used up.
    """
    rows, channels = 2 if residual is None else 3, tiling.channels
    if not tiling.numel:
        for grad in parameter_grads:
            if grad is not None:
                grad.zero_()
        return stats.new_zeros((1, rows, stats.shape[1]))
    stride = rows * channels
    partials = stats.new_empty_strided((tiling.parts, rows, channels), (stride, channels, 1))
    _sums_launch(tiling, x.dtype, act)(queue, dy, x, stats, residual, residual_stats, relu_mask, partials)
    _merge_sums_launch(tiling.parts, rows, channels)(queue, partials, *parameter_grads)
    return partials


@lru_cache(maxsize=4096)
def _sums_launch(tiling: Tiling, dtype: torch.dtype, act: tuple[int, float]) -> Launch:
    scalars = *tiling.extents, tiling.tiles, tiling.tiles_per_part, *act, *tiling.constexprs, accumulator_dtype(dtype)
    return Launch(kernels.sums_kernel, (tiling.parts * tiling.blocks,), scalars, tiling.options)


@lru_cache(maxsize=4096)
def _merge_sums_launch(parts: int, rows: int, channels: int) -> Launch:
    grid = (triton.cdiv(rows * channels, _BLOCK_CHANNELS),)
    return Launch(merge_norm_sums_kernel, grid, (parts, channels, rows, _BLOCK_PARTS, _BLOCK_CHANNELS))


def sum_partials(partials: Tensor) -> Tensor:
    """Sum ``(parts, rows, C)`` over the first dimension, in a fixed order."""
    parts, rows, channels = partials.shape
    while parts > 1:
        group_size = _merge_group_size(parts)
        groups = triton.cdiv(parts, group_size)
        merged = partials.new_empty((groups, rows, channels))
        launch(
            kernels.merge_sums_kernel, (triton.cdiv(rows * channels, 32), groups),
            partials, merged, parts, group_size, rows * channels, BLOCK_PARTS=64, BLOCK_WIDTH=32,
        )  # fmt: skip
        partials, parts = merged, groups
    return partials[0]


@register_operator
def batch_norm_act_dx(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    activation: str,
    sums: Tensor | None,
    count: int,
    negative_slope: float = 0.01,
) -> Tensor:
    act = backward_constexprs(activation, negative_slope, relu_mask)
    x, tiling = dense_tiling(input)
    dx = torch.empty_like(x)
    if tiling.numel:
        dy = in_layout_of(grad_output, x, tiling)
        launch_dx = dx_launch(tiling, x.dtype, count, act, sums is not None, False)
        launch_dx(queue_of(x), dy, x, stats, None, None, relu_mask, sums, dx, None)
    return dx


@lru_cache(maxsize=4096)
def dx_launch(
    tiling: Tiling, dtype: torch.dtype, count: int, act: tuple[int, float], training: bool, residual_training: bool
) -> Launch:
    """Return the launch of ``dx_kernel``, whose tensors are dense and have the memory format of ``tiling``."""
    flags = *act, training, residual_training
    scalars = *tiling.extents, count, *flags, *tiling.constexprs, accumulator_dtype(dtype)
    return Launch(kernels.dx_kernel, (tiling.tiles * tiling.blocks,), scalars, tiling.options)
