"""Backward of a 1x1 convolution between two norms: ``conv_dgrad`` and ``conv_wgrad``.

Neither the gradient of the convolution's output nor the activation that it read is in memory: both are formed from raw
outputs and statistics as they are loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_res.backends.triton.kernels.batch_norm_act import before_norm, load_mean_terms, load_norm
from fused_res.backends.triton.kernels.elementwise import normalise, passes, relu, unpack_bits

# fmt: off


@triton.jit
def _load_bits(
    mask_ptr, row, row_inside, col, channels, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):
    width = (channels + 7) // 8
    byte = tl.min(col, axis=0) // 8 + tl.arange(0, BLOCK_COLS // 8)
    inside = row_inside[:, None] & (byte < width)[None, :]
    return unpack_bits(
        tl.load(mask_ptr + row[:, None] * width + byte[None, :], inside, other=0), BLOCK_ROWS, BLOCK_COLS
    )


@triton.jit
def _load_dz(
    dy_ptr, z_ptr, stats_ptr, mask_ptr, sums_ptr, row, row_inside, col, channels, count,
    RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):
    """A tile of the gradient before the norm, from the one behind its ReLU; zero outside."""
    col_inside = col < channels
    inside = row_inside[:, None] & col_inside[None, :]
    at = row[:, None] * channels + col[None, :]
    z = tl.load(z_ptr + at, inside, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + at, inside, other=0).to(tl.float32)
    mean, scale, shift = load_norm(stats_ptr, col, col_inside, channels)
    if mask_ptr is not None:
        dy = tl.where(_load_bits(mask_ptr, row, row_inside, col, channels, BLOCK_ROWS, BLOCK_COLS), dy, 0)
    elif RELU:
        dy = tl.where(passes(normalise(z, mean[None, :], scale[None, :], shift[None, :])), dy, 0)
    if sums_ptr is not None:
        a, b = load_mean_terms(sums_ptr, 1, stats_ptr, col, col_inside, channels, count)
        dz = before_norm(dy, z, mean[None, :], scale[None, :], a[None, :], b[None, :])
    else:
        dz = dy * scale[None, :]
    return tl.where(inside, dz, 0).to(dy_ptr.dtype.element_ty)


@triton.jit
def dgrad_kernel(
    dy_ptr, z_ptr,     # (rows, out_channels): gradient behind the norm, the norm's input
    stats_ptr, mask_ptr, sums_ptr,
    w_ptr,             # (out_channels, channels)
    dx_ptr,            # (rows, channels)
    x_ptr, x_stats_ptr,  # (rows, channels), (5, channels) of the norm that the convolution read through; or None
    partials_ptr,      # (row tiles, 2, channels) of that norm's sums, or None
    added_ptr, added_mask_ptr,  # like dx, and its mask: the gradient of a shortcut; or None
    rows, channels, out_channels, count, col_tiles,
    RELU: tl.constexpr, INPUT_RELU: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    if LARGE:
        tile = tile.to(tl.int64)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_inside, col_inside = row < rows, col < channels
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, out_channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dz = _load_dz(
            dy_ptr, z_ptr, stats_ptr, mask_ptr, sums_ptr, row, row_inside, k, out_channels, count,
            RELU, BLOCK_ROWS, BLOCK_K,
        )
        inside = (k < out_channels)[:, None] & col_inside[None, :]
        weight = tl.load(w_ptr + k[:, None] * channels + col[None, :], inside, other=0)
        acc = tl.dot(dz, weight, acc, input_precision=PRECISION)

    inside = row_inside[:, None] & col_inside[None, :]
    at = row[:, None] * channels + col[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + at, inside, other=0).to(tl.float32)
        mean, scale, shift = load_norm(x_stats_ptr, col, col_inside, channels)
        if INPUT_RELU:
            acc = tl.where(passes(normalise(x, mean[None, :], scale[None, :], shift[None, :])) & inside, acc, 0)
        invstd = tl.load(x_stats_ptr + channels + col, col_inside, other=0)
        xhat = tl.where(inside, x - mean[None, :], 0)
        out = partials_ptr + tile * 2 * channels + col
        tl.store(out, tl.sum(acc, axis=0), col_inside)
        tl.store(out + channels, tl.sum(acc * xhat, axis=0) * invstd, col_inside)
    if added_ptr is not None:
        added = tl.load(added_ptr + at, inside, other=0).to(tl.float32)
        if added_mask_ptr is not None:
            passed = _load_bits(added_mask_ptr, row, row_inside, col, channels, BLOCK_ROWS, BLOCK_COLS)
            added = tl.where(passed, added, 0)
        acc += added
    tl.store(dx_ptr + at, acc.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
def wgrad_kernel(
    dy_ptr, z_ptr,       # (rows, out_channels)
    stats_ptr, mask_ptr, sums_ptr,
    x_ptr, x_stats_ptr,  # (N, H, W, channels); (5, channels) where the convolution read through a norm, or None
    dw_ptr,              # (splits, out_channels, channels)
    rows, channels, out_channels, count, H, W, P, Q, col_tiles, rows_per_split,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    RELU: tl.constexpr, INPUT_RELU: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """``BLOCK_K`` rows at a time are summed over; a tile is output channels by input channels."""
    out_tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    split = tl.program_id(1)
    out = out_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_inside = col < channels
    first = split * rows_per_split
    if LARGE:
        first = first.to(tl.int64)
    last = tl.minimum(first + rows_per_split, rows)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_inside = row < last
        dz = _load_dz(
            dy_ptr, z_ptr, stats_ptr, mask_ptr, sums_ptr, row, row_inside, out, out_channels, count,
            RELU, BLOCK_K, BLOCK_ROWS,
        )
        pixel = row
        if STRIDE_H * STRIDE_W > 1:
            pixel = (row // (P * Q) * H + row // Q % P * STRIDE_H) * W + row % Q * STRIDE_W
        inside = row_inside[:, None] & col_inside[None, :]
        x = tl.load(x_ptr + pixel[:, None] * channels + col[None, :], inside, other=0)
        if x_stats_ptr is not None:
            mean, scale, shift = load_norm(x_stats_ptr, col, col_inside, channels)
            a = normalise(x.to(tl.float32), mean[None, :], scale[None, :], shift[None, :])
            if INPUT_RELU:
                a = relu(a)
            x = tl.where(inside, a, 0).to(x_ptr.dtype.element_ty)
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION)
    at = (split * out_channels + out)[:, None] * channels + col[None, :]
    tl.store(dw_ptr + at, acc, (out < out_channels)[:, None] & col_inside[None, :])
