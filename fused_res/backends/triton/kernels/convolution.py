"""Implicit-GEMM forward convolution, NHWC, with split-K: shared by ``conv_bias_act`` and ``conv_bn_stats``.

M runs over output pixels, N over output channels. K runs over the taps of the filter and, within each tap, over the
input channels, which are contiguous in channels_last memory. The im2col matrix is never stored; see Chetlur et al.
(2014), https://arxiv.org/abs/1410.0759. An optional prologue applies batch norm and ReLU to the input operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_res.backends.triton.kernels.batch_norm_act import load_norm
from fused_res.backends.triton.kernels.elementwise import normalize, relu

# fmt: off


@triton.jit
def _store_partials(acc, inside, partials_ptr, pid_m, count, offs_n, out_channels, n_inside):
    """Store the partial statistics of the tile's columns, from two passes over its registers.

    They are count, mean, M2 and the low part of the mean.
    """
    total = tl.sum(tl.where(inside, acc, 0), axis=0)
    mean = total / count
    d = tl.where(inside, acc - mean[None, :], 0)
    # The mean of the deviations is the low part of the mean.
    mean_low = tl.sum(d, axis=0) / count
    m2 = tl.sum(d * d, axis=0) - mean_low * mean_low * count
    out = partials_ptr + pid_m * 4 * out_channels + offs_n
    tl.store(out, tl.zeros_like(mean) + count, n_inside)
    tl.store(out + out_channels, mean, n_inside)
    tl.store(out + 2 * out_channels, m2, n_inside)
    tl.store(out + 3 * out_channels, mean_low, n_inside)


@triton.jit
def _epilogue(
    acc, y_ptr, bias_ptr, residual_ptr, partials_ptr, pid_m, offs_m, M, offs_n, n_inside, out_channels,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Epilogue: add the bias, store the partial statistics, add the residual, apply the ReLU, store the output."""
    inside = (offs_m < M)[:, None] & n_inside[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, n_inside, other=0).to(acc.dtype)[None, :]
    if partials_ptr is not None:
        # The statistics are those of the output as it is stored: the norm is applied to it, not to the accumulators.
        acc = acc.to(y_ptr.dtype.element_ty).to(acc.dtype)
        count = tl.minimum(BLOCK_M, M - pid_m * BLOCK_M).to(tl.float32)
        _store_partials(acc, inside, partials_ptr, pid_m, count, offs_n, out_channels, n_inside)
    offsets = offs_m[:, None] * out_channels + offs_n[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, inside, other=0).to(acc.dtype)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "k_blocks_per_split"])
def convolution_kernel(
    x_ptr,            # (N, H, W, channels)
    w_ptr,            # (out_channels, R, S, group_channels)
    y_ptr,            # (N, P, Q, out_channels), or with SPLIT_K partial accumulators (splits, N * P * Q, out_channels)
    bias_ptr, residual_ptr,  # (out_channels), like y; or None
    input_stats_ptr,  # (5, channels) of the prologue's norm, or None
    partials_ptr,     # (tiles of M, 4, out_channels), or None
    M, channels, out_channels, group_channels, group_out_channels,
    H, W, P, Q, tiles_n, k_blocks_per_split,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    INPUT_RELU: tl.constexpr, RELU: tl.constexpr, SPLIT_K: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # Consecutive programs read the same tile of x, the larger operand.
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    group, split = tl.program_id(1), tl.program_id(2)
    if LARGE:
        pid_m = pid_m.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n_in_group = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n, n_inside = group * group_out_channels + offs_n_in_group, offs_n_in_group < group_out_channels
    POINTWISE: tl.constexpr = R * S == 1 and STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0
    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    image, p, q = offs_m // (P * Q), offs_m // Q % P, offs_m % Q

    k_blocks_per_tap = tl.cdiv(group_channels, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * k_blocks_per_split
    for k_block in range(first, tl.minimum(first + k_blocks_per_split, R * S * k_blocks_per_tap)):
        tap = k_block // k_blocks_per_tap
        offs_k = k_block % k_blocks_per_tap * BLOCK_K + tl.arange(0, BLOCK_K)
        k_inside = offs_k < group_channels
        m_inside = offs_m < M
        if POINTWISE:
            pixel = offs_m
        else:
            h = p * STRIDE_H - PAD_H + tap // S * DILATION_H
            w = q * STRIDE_W - PAD_W + tap % S * DILATION_W
            if PADDED:
                m_inside &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
            pixel = (image * H + h) * W + w
        inside = m_inside[:, None] & k_inside[None, :]
        x = tl.load(x_ptr + pixel[:, None] * channels + (group * group_channels + offs_k)[None, :], inside, other=0)
        if input_stats_ptr is not None:
            mean, scale, shift = load_norm(input_stats_ptr, group * group_channels + offs_k, k_inside, channels)
            a = normalize(x.to(tl.float32), mean[None, :], scale[None, :], shift[None, :])
            if INPUT_RELU:
                a = relu(a)
            # Padding is zero after the norm, not before it.
            x = tl.where(inside, a, 0).to(x_ptr.dtype.element_ty)
        offsets = offs_n[None, :] * (R * S * group_channels) + tap * group_channels + offs_k[:, None]
        weight = tl.load(w_ptr + offsets, k_inside[:, None] & n_inside[None, :], other=0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if SPLIT_K:
        partial_acc = y_ptr + split.to(tl.int64) * M * out_channels
        offsets = offs_m[:, None] * out_channels + offs_n[None, :]
        tl.store(partial_acc + offsets, acc, (offs_m < M)[:, None] & n_inside[None, :])
    else:
        _epilogue(
            acc, y_ptr, bias_ptr, residual_ptr, partials_ptr, pid_m, offs_m, M, offs_n, n_inside, out_channels,
            RELU, BLOCK_M,
        )


@triton.jit(do_not_specialize=["M", "splits"])
def split_k_epilogue_kernel(
    partial_acc_ptr,  # (splits, M, out_channels)
    y_ptr, bias_ptr, residual_ptr, partials_ptr,
    M, out_channels, splits, tiles_n,
    RELU: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Split-K reduction: add the partial accumulators of one output tile in a fixed order, then run the epilogue."""
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    if LARGE:
        pid_m = pid_m.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < M)[:, None] & (offs_n < out_channels)[None, :]
    ptrs = partial_acc_ptr + offs_m[:, None] * out_channels + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        acc += tl.load(ptrs, inside, other=0)
        ptrs += tl.cast(M, tl.int64) * out_channels
    _epilogue(
        acc, y_ptr, bias_ptr, residual_ptr, partials_ptr, pid_m, offs_m, M, offs_n, offs_n < out_channels, out_channels,
        RELU, BLOCK_M,
    )
