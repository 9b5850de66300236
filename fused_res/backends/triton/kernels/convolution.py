"""Forward convolution as an implicit matrix product: ``conv_bias_act`` and ``conv_bn_stats`` share its main loop.

Rows of the product are output pixels, columns output channels; what is summed over runs through the taps of the kernel
and, inside each, through the input channels, which lie next to each other in channels_last memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_res.backends.triton.kernels.batch_norm_act import load_norm
from fused_res.backends.triton.kernels.elementwise import normalise, relu

# fmt: off


@triton.jit
def _store_partials(acc, inside, partials_ptr, tile, count, col, out_channels, col_inside):
    """Count, mean, M2 and the mean's rest of each column of the tile, two passes over registers."""
    total = tl.sum(tl.where(inside, acc, 0), axis=0)
    mean = total / count
    d = tl.where(inside, acc - mean[None, :], 0)
    # Once more for what rounding left in the mean.
    rest = tl.sum(d, axis=0) / count
    m2 = tl.sum(d * d, axis=0) - rest * rest * count
    out = partials_ptr + tile * 4 * out_channels + col
    tl.store(out, tl.zeros_like(mean) + count, col_inside)
    tl.store(out + out_channels, mean, col_inside)
    tl.store(out + 2 * out_channels, m2, col_inside)
    tl.store(out + 3 * out_channels, rest, col_inside)


@triton.jit
def _epilogue(
    acc, y_ptr, bias_ptr, residual_ptr, partials_ptr, tile, row, rows, col, col_inside, out_channels,
    RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):
    """Everything behind the sum: bias, statistics of what is written, residual, ReLU."""
    inside = (row < rows)[:, None] & col_inside[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, col_inside, other=0).to(acc.dtype)[None, :]
    if partials_ptr is not None:
        count = tl.minimum(BLOCK_ROWS, rows - tile * BLOCK_ROWS).to(tl.float32)
        _store_partials(acc, inside, partials_ptr, tile, count, col, out_channels, col_inside)
    at = row[:, None] * out_channels + col[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, inside, other=0).to(acc.dtype)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def convolution_kernel(
    x_ptr,            # (N, H, W, channels)
    w_ptr,            # (out_channels, R, S, group_channels)
    y_ptr,            # (N, P, Q, out_channels), or (splits, N * P * Q, out_channels) of sums where SPLIT
    bias_ptr, residual_ptr,  # (out_channels), like y; or None
    input_stats_ptr,  # (5, channels): x is normalised as it is read; or None
    partials_ptr,     # (row tiles, 4, out_channels), or None
    rows, channels, out_channels, group_channels, group_out_channels,
    H, W, P, Q, col_tiles, chunks_per_split,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    INPUT_RELU: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # Neighbours share their rows of x, the larger operand.
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    group, split = tl.program_id(1), tl.program_id(2)
    if LARGE:
        tile = tile.to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_group = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col, col_inside = group * group_out_channels + in_group, in_group < group_out_channels
    PLAIN: tl.constexpr = R * S == 1 and STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0
    BORDERED: tl.constexpr = PAD_H + PAD_W > 0
    image, p, q = row // (P * Q), row // Q % P, row % Q

    chunks_per_tap = tl.cdiv(group_channels, BLOCK_K)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = split * chunks_per_split
    for chunk in range(first, tl.minimum(first + chunks_per_split, R * S * chunks_per_tap)):
        tap = chunk // chunks_per_tap
        k = chunk % chunks_per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        k_inside = k < group_channels
        row_inside = row < rows
        if PLAIN:
            pixel = row
        else:
            h = p * STRIDE_H - PAD_H + tap // S * DILATION_H
            w = q * STRIDE_W - PAD_W + tap % S * DILATION_W
            if BORDERED:
                row_inside &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
            pixel = (image * H + h) * W + w
        inside = row_inside[:, None] & k_inside[None, :]
        x = tl.load(x_ptr + pixel[:, None] * channels + (group * group_channels + k)[None, :], inside, other=0)
        if input_stats_ptr is not None:
            mean, scale, shift = load_norm(input_stats_ptr, group * group_channels + k, k_inside, channels)
            a = normalise(x.to(tl.float32), mean[None, :], scale[None, :], shift[None, :])
            if INPUT_RELU:
                a = relu(a)
            # What lies outside the image is zero behind the norm, not before it.
            x = tl.where(inside, a, 0).to(x_ptr.dtype.element_ty)
        at = col[None, :] * (R * S * group_channels) + tap * group_channels + k[:, None]
        weight = tl.load(w_ptr + at, k_inside[:, None] & col_inside[None, :], other=0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if SPLIT:
        sums = y_ptr + split.to(tl.int64) * rows * out_channels
        at = row[:, None] * out_channels + col[None, :]
        tl.store(sums + at, acc, (row < rows)[:, None] & col_inside[None, :])
    else:
        _epilogue(
            acc, y_ptr, bias_ptr, residual_ptr, partials_ptr, tile, row, rows, col, col_inside, out_channels,
            RELU, BLOCK_ROWS,
        )


@triton.jit
def split_epilogue_kernel(
    sums_ptr,  # (splits, rows, out_channels)
    y_ptr, bias_ptr, residual_ptr, partials_ptr,
    rows, out_channels, splits, col_tiles,
    RELU: tl.constexpr, LARGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):
    """Adds up what the splits have found, in their order, and goes on as one program would have."""
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    if LARGE:
        tile = tile.to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < out_channels)[None, :]
    at = sums_ptr + row[:, None] * out_channels + col[None, :]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for _ in range(splits):
        acc += tl.load(at, inside, other=0)
        at += tl.cast(rows, tl.int64) * out_channels
    _epilogue(
        acc, y_ptr, bias_ptr, residual_ptr, partials_ptr, tile, row, rows, col, col < out_channels, out_channels,
        RELU, BLOCK_ROWS,
    )
