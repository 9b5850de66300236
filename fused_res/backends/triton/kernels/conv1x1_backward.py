"""GEMM kernels of a 1x1 convolution's backward, between two batch norms: ``conv_dgrad`` and ``conv_wgrad``.

Neither the gradient of the convolution's output nor its normalized input is in memory: operand prologues compute both
from raw convolution outputs and statistics. ``conv_dgrad`` is also fused with the backward of the input's norm: it
applies the ReLU mask and computes the partial backward reductions in its epilogue. Both of its norms are optional.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_res.backends.triton.kernels.batch_norm_act import load_mean_terms, load_norm, norm_input_grad
from fused_res.backends.triton.kernels.elementwise import normalize, relu, relu_grad_mask, unpack_bits

# fmt: off


@triton.jit
def _load_relu_mask(
    mask_ptr, row, row_inside, col, channels, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):
    """Load a tile of a channels_last ``relu_mask`` as booleans."""
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
    """Operand prologue: a tile of the gradient of the convolution's output, from the gradient of act(bn(output)).

    Elements out of bounds are zero.
    """
    col_inside = col < channels
    inside = row_inside[:, None] & col_inside[None, :]
    offsets = row[:, None] * channels + col[None, :]
    z = tl.load(z_ptr + offsets, inside, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, inside, other=0).to(tl.float32)
    mean, scale, shift = load_norm(stats_ptr, col, col_inside, channels)
    if mask_ptr is not None:
        dy = tl.where(_load_relu_mask(mask_ptr, row, row_inside, col, channels, BLOCK_ROWS, BLOCK_COLS), dy, 0)
    elif RELU:
        dy = tl.where(relu_grad_mask(normalize(z, mean[None, :], scale[None, :], shift[None, :])), dy, 0)
    if sums_ptr is not None:
        a, b = load_mean_terms(sums_ptr, 1, stats_ptr, col, col_inside, channels, count)
        dz = norm_input_grad(dy, z, mean[None, :], scale[None, :], a[None, :], b[None, :])
    else:
        dz = dy * scale[None, :]
    return tl.where(inside, dz, 0).to(dy_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["M", "count"])
def dgrad_kernel(
    dy_ptr, z_ptr,     # (M, out_channels): gradient of the norm's output, raw convolution output; or dz and None
    stats_ptr, mask_ptr, sums_ptr,
    w_ptr,             # (out_channels, channels)
    dx_ptr,            # (M, channels)
    x_ptr, x_stats_ptr,  # (M, channels), (5, channels): raw input and its norm; or None: the input has no norm
    partials_ptr,      # (tiles of M, 2, channels): partial backward reductions of that norm, or None
    shortcut_grad_ptr, shortcut_mask_ptr,  # gradient of the shortcut, (M, channels), and its relu_mask; or None
    M, channels, out_channels, count, tiles_n,
    RELU: tl.constexpr, INPUT_RELU: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``dx = dz @ w``: M runs over pixels, N over input channels, K over output channels."""
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    if LARGE:
        pid_m = pid_m.to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside, n_inside = offs_m < M, offs_n < channels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, out_channels, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        if z_ptr is not None:
            dz = _load_dz(
                dy_ptr, z_ptr, stats_ptr, mask_ptr, sums_ptr, offs_m, m_inside, offs_k, out_channels, count,
                RELU, BLOCK_M, BLOCK_K,
            )
        else:
            inside = m_inside[:, None] & (offs_k < out_channels)[None, :]
            dz = tl.load(dy_ptr + offs_m[:, None] * out_channels + offs_k[None, :], inside, other=0)
        inside = (offs_k < out_channels)[:, None] & n_inside[None, :]
        weight = tl.load(w_ptr + offs_k[:, None] * channels + offs_n[None, :], inside, other=0)
        acc = tl.dot(dz, weight, acc, input_precision=PRECISION)

    inside = m_inside[:, None] & n_inside[None, :]
    offsets = offs_m[:, None] * channels + offs_n[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, inside, other=0).to(tl.float32)
        mean, scale, shift = load_norm(x_stats_ptr, offs_n, n_inside, channels)
        if INPUT_RELU:
            acc = tl.where(relu_grad_mask(normalize(x, mean[None, :], scale[None, :], shift[None, :])) & inside, acc, 0)
        invstd = tl.load(x_stats_ptr + channels + offs_n, n_inside, other=0)
        centered = tl.where(inside, x - mean[None, :], 0)
        out = partials_ptr + pid_m * 2 * channels + offs_n
        tl.store(out, tl.sum(acc, axis=0), n_inside)
        tl.store(out + channels, tl.sum(acc * centered, axis=0) * invstd, n_inside)
    if shortcut_grad_ptr is not None:
        shortcut_grad = tl.load(shortcut_grad_ptr + offsets, inside, other=0).to(tl.float32)
        if shortcut_mask_ptr is not None:
            mask = _load_relu_mask(shortcut_mask_ptr, offs_m, m_inside, offs_n, channels, BLOCK_M, BLOCK_N)
            shortcut_grad = tl.where(mask, shortcut_grad, 0)
        acc += shortcut_grad
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["pixels", "count", "H", "W", "P", "Q", "pixels_per_split"])
def wgrad_kernel(
    dy_ptr, z_ptr,       # (pixels, out_channels): gradient of the norm's output, raw convolution output
    stats_ptr, mask_ptr, sums_ptr,
    x_ptr, x_stats_ptr,  # (N, H, W, channels); (5, channels) of the prologue's norm, or None
    dw_ptr,              # (out_channels, channels), or with split-K partial accumulators: (splits, ...)
    pixels, channels, out_channels, count, H, W, P, Q, tiles_n, pixels_per_split,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    RELU: tl.constexpr, INPUT_RELU: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``dw = dz.T @ x``: M runs over output channels, N over input channels, K over pixels.

    With split-K each split stores its partial accumulators; ``merge_sums_kernel`` adds them.
    """
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    split = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = offs_n < channels
    first = split * pixels_per_split
    if LARGE:
        first = first.to(tl.int64)
    last = tl.minimum(first + pixels_per_split, pixels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        k_inside = offs_k < last
        dz = _load_dz(
            dy_ptr, z_ptr, stats_ptr, mask_ptr, sums_ptr, offs_k, k_inside, offs_m, out_channels, count,
            RELU, BLOCK_K, BLOCK_M,
        )
        x_pixel = offs_k
        if STRIDE_H * STRIDE_W > 1:
            x_pixel = (offs_k // (P * Q) * H + offs_k // Q % P * STRIDE_H) * W + offs_k % Q * STRIDE_W
        inside = k_inside[:, None] & n_inside[None, :]
        x = tl.load(x_ptr + x_pixel[:, None] * channels + offs_n[None, :], inside, other=0)
        if x_stats_ptr is not None:
            mean, scale, shift = load_norm(x_stats_ptr, offs_n, n_inside, channels)
            a = normalize(x.to(tl.float32), mean[None, :], scale[None, :], shift[None, :])
            if INPUT_RELU:
                a = relu(a)
            x = tl.where(inside, a, 0).to(x_ptr.dtype.element_ty)
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION)
    offsets = (split * out_channels + offs_m)[:, None] * channels + offs_n[None, :]
    tl.store(dw_ptr + offsets, acc.to(dw_ptr.dtype.element_ty), (offs_m < out_channels)[:, None] & n_inside[None, :])
