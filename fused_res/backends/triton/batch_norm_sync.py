"""Launchers of batch norm's passes as separate operators: statistics and their merge, backward reductions, and dx.

Between the passes, synchronized batch norm combines the partial statistics of all ranks. The variances are merged by
the parallel algorithm of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_res.backends.reference import batch_norm_sync as reference
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import register_operator
from fused_res.backends.triton.tiles import accumulator_dtype, choose_tiling
from fused_res.ops import stats_dtype
from fused_res.ops.memory_format import is_channels_last, to_dense_layout, to_memory_format

#: Maximum number of partial statistics that one program merges; more, as from a convolution's tiles, are merged in
#: groups first.
_MAX_PARTIALS = 1024
_MIN_GROUP = 64
_BLOCK = {"BLOCK_PARTS": 64, "BLOCK_CHANNELS": 32}


@register_operator
def batch_norm_partials(input: Tensor) -> Tensor:
    input = to_dense_layout(input)
    return merge_partial_stats(compute_partials(input)) if input.numel() else reference.batch_norm_partials(input)


def compute_partials(input: Tensor) -> Tensor:
    """Compute the partial statistics of a dense, non-empty input in one pass.

    Returns:
        ``(parts, 4, C)`` in the accumulation dtype: count, high part of the mean, M2, and low part of the mean. The
        mean is high + low: where a channel's values are nearly equal, the rounding error of the high part alone is not
        small compared with their deviation.
    """
    tiling = choose_tiling(input)
    partials = input.new_empty((tiling.parts, 4, tiling.channels), dtype=stats_dtype(input.dtype))
    launch(
        kernels.partials_kernel, (tiling.parts * tiling.blocks,),
        input, partials, *tiling.extents, tiling.tiles, tiling.tiles_per_part, *tiling.constexprs,
        accumulator_dtype(input.dtype), **tiling.options,
    )  # fmt: skip
    return partials


def _merge_group_size(parts: int) -> int:
    """Return how many partials a program merges; the second dimension of a grid is at most 65535."""
    return parts if parts <= _MAX_PARTIALS else max(_MIN_GROUP, triton.cdiv(parts, 65535))


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
        group_size = _merge_group_size(parts)
        groups = triton.cdiv(parts, group_size)
        merged = partials.new_empty((groups, 3, channels), dtype=torch.float64)
        launch(
            kernels.merge_partials_kernel, (triton.cdiv(channels, _BLOCK["BLOCK_CHANNELS"]), groups),
            partials, merged, None, None, parts, group_size, channels, 0.0, False, rows, **_BLOCK,
        )  # fmt: skip
        partials = merged
    return partials.double()


@register_operator
def merge_stats(partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool) -> Tensor:
    if partials.shape[0] > _MAX_PARTIALS:
        partials = merge_partial_stats(partials, _MAX_PARTIALS)
    partials = partials.contiguous()
    parts, rows, channels = partials.shape
    stats = partials.new_empty((5, channels), dtype=torch.float64 if double else torch.float32)
    launch(
        kernels.merge_partials_kernel, (triton.cdiv(channels, _BLOCK["BLOCK_CHANNELS"]), 1),
        partials, stats, weight, bias, parts, parts, channels, eps, True, rows, **_BLOCK,
    )  # fmt: skip
    return stats


@register_operator
def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    residual: Tensor | None,
    residual_stats: Tensor | None,
) -> Tensor:
    input = to_dense_layout(input)
    rows = 2 if residual is None else 3
    if not input.numel():
        return stats.new_zeros((rows, stats.shape[1]))
    grad_output = to_memory_format(grad_output, is_channels_last(input))
    if residual is not None:
        residual = to_memory_format(residual, is_channels_last(input))
    tiling = choose_tiling(input)
    partials = stats.new_empty((tiling.parts, rows, tiling.channels))
    launch(
        kernels.sums_kernel, (tiling.parts * tiling.blocks,),
        grad_output, input, stats, residual, residual_stats, relu_mask, partials,
        *tiling.extents, tiling.tiles, tiling.tiles_per_part, relu, *tiling.constexprs,
        accumulator_dtype(input.dtype), **tiling.options,
    )  # fmt: skip
    return sum_partials(partials)


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
    relu: bool,
    sums: Tensor | None,
    count: int,
) -> Tensor:
    input = to_dense_layout(input)
    dx = torch.empty_like(input)
    if not input.numel():
        return dx
    grad_output = to_memory_format(grad_output, is_channels_last(input))
    launch_dx(grad_output, input, stats, None, None, relu_mask, sums, dx, None, count, relu, sums is not None, False)
    return dx


def launch_dx(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu_mask: Tensor | None,
    sums: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    count: int,
    relu: bool,
    training: bool,
    residual_training: bool,
) -> None:
    """Write ``dx`` and ``dresidual`` if they are not None; all tensors are dense and have the same memory format."""
    tiling = choose_tiling(input)
    launch(
        kernels.dx_kernel, (tiling.tiles * tiling.blocks,),
        grad_output, input, stats, residual, residual_stats, relu_mask, sums, dx, dresidual, *tiling.extents, count,
        relu, training, residual_training, *tiling.constexprs, accumulator_dtype(input.dtype), **tiling.options,
    )  # fmt: skip
