"""The halves of a norm, between which several processes may add up what they found."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_res.backends.reference import batch_norm_sync as reference
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.launch import launch
from fused_res.backends.triton.registration import operator
from fused_res.backends.triton.tiles import accumulator, tiling
from fused_res.ops import stats_dtype
from fused_res.ops.memory_format import dense, is_channels_last, laid_out

#: Parts that one program merges; where a convolution's tiles bring more, groups of them are merged first.
_MOST_PARTS = 1024
_GROUP = 64
_BLOCK = {"BLOCK_PARTS": 64, "BLOCK_CHANNELS": 32}


@operator
def batch_norm_partials(input: Tensor) -> Tensor:
    input = dense(input)
    return merge_parts(tile_partials(input)) if input.numel() else reference.batch_norm_partials(input)


def tile_partials(input: Tensor) -> Tensor:
    """``(parts, 4, C)`` in the accumulation dtype, from one pass over a dense input that is not empty.

    The fourth row is what rounding took from the mean: with two values a channel that close to each other matters.
    """
    cut = tiling(input)
    partials = input.new_empty((cut.parts, 4, cut.channels), dtype=stats_dtype(input.dtype))
    launch(
        kernels.partials_kernel, (cut.parts * cut.blocks,),
        input, partials, *cut.matrix, cut.tiles, cut.tiles_per_part, *cut.shape, accumulator(input.dtype),
        **cut.options,
    )  # fmt: skip
    return partials


def _group(parts: int) -> int:
    """How many parts a program merges; a grid's second dimension is bounded."""
    return parts if parts <= _MOST_PARTS else max(_GROUP, triton.cdiv(parts, 65535))


def merge_parts(partials: Tensor, most: int = 1) -> Tensor:
    """Merges parts of three rows or four until there are at most so many, of three."""
    while partials.shape[0] > most or partials.shape[1] == 4:
        parts, rows, channels = partials.shape
        group = _group(parts)
        groups = triton.cdiv(parts, group)
        merged = partials.new_empty((groups, 3, channels), dtype=torch.float64)
        launch(
            kernels.merge_partials_kernel, (triton.cdiv(channels, _BLOCK["BLOCK_CHANNELS"]), groups),
            partials, merged, None, None, parts, group, channels, 0.0, False, rows, **_BLOCK,
        )  # fmt: skip
        partials = merged
    return partials.double()


@operator
def merge_stats(partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool) -> Tensor:
    if partials.shape[0] > _MOST_PARTS:
        partials = merge_parts(partials, _MOST_PARTS)
    partials = partials.contiguous()
    parts, rows, channels = partials.shape
    stats = partials.new_empty((5, channels), dtype=torch.float64 if double else torch.float32)
    launch(
        kernels.merge_partials_kernel, (triton.cdiv(channels, _BLOCK["BLOCK_CHANNELS"]), 1),
        partials, stats, weight, bias, parts, parts, channels, eps, True, rows, **_BLOCK,
    )  # fmt: skip
    return stats


@operator
def batch_norm_sums(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    residual: Tensor | None,
    residual_stats: Tensor | None,
) -> Tensor:
    input = dense(input)
    rows = 2 if residual is None else 3
    if not input.numel():
        return stats.new_zeros((rows, stats.shape[1]))
    grad_output = laid_out(grad_output, is_channels_last(input))
    if residual is not None:
        residual = laid_out(residual, is_channels_last(input))
    cut = tiling(input)
    partials = stats.new_empty((cut.parts, rows, cut.channels))
    launch(
        kernels.sums_kernel, (cut.parts * cut.blocks,),
        grad_output, input, stats, residual, residual_stats, relu_mask, partials,
        *cut.matrix, cut.tiles, cut.tiles_per_part, relu, *cut.shape, accumulator(input.dtype), **cut.options,
    )  # fmt: skip
    return merge_sums(partials)


def merge_sums(partials: Tensor) -> Tensor:
    """Adds up ``(parts, rows, C)``, in a fixed order."""
    parts, rows, channels = partials.shape
    while parts > 1:
        group = _group(parts)
        groups = triton.cdiv(parts, group)
        merged = partials.new_empty((groups, rows, channels))
        launch(
            kernels.merge_sums_kernel, (triton.cdiv(rows * channels, 32), groups),
            partials, merged, parts, group, rows * channels, BLOCK_PARTS=64, BLOCK_WIDTH=32,
        )  # fmt: skip
        partials, parts = merged, groups
    return partials[0]


@operator
def batch_norm_act_dx(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    relu_mask: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
) -> Tensor:
    input = dense(input)
    dx = torch.empty_like(input)
    if not input.numel():
        return dx
    grad_output = laid_out(grad_output, is_channels_last(input))
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
    """Writes ``dx`` and ``dresidual``, where there are any; all tensors are dense and of one layout."""
    cut = tiling(input)
    launch(
        kernels.dx_kernel, (cut.tiles * cut.blocks,),
        grad_output, input, stats, residual, residual_stats, relu_mask, sums, dx, dresidual, *cut.matrix, count,
        relu, training, residual_training, *cut.shape, accumulator(input.dtype), **cut.options,
    )  # fmt: skip
