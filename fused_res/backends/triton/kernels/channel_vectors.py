"""Kernels on per-channel vectors: the gradients of batch norm's parameters, and the running statistics."""

from __future__ import annotations

import triton
import triton.language as tl

# fmt: off


@triton.jit(do_not_specialize=["parts"])
def merge_norm_sums_kernel(
    sums_ptr,  # (parts, ROWS, channels): partial sums of dy, of dy * xhat and, with ROWS = 3, of dy * residual xhat
    dweight_ptr, dbias_ptr, dresidual_weight_ptr, dresidual_bias_ptr,  # (channels), or None if not requested
    parts, channels,
    ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """Sum partial sums into the first of them, in float64 and in a fixed order, and store them as gradients.

    A program reads only columns that no other program writes.
    """
    width = ROWS * channels
    col = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_WIDTH,), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < parts)[:, None] & (col < width)[None, :]
        total += tl.sum(tl.load(sums_ptr + part[:, None] * width + col[None, :], inside, other=0).to(tl.float64), 0)
    rounded = total.to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + col, rounded, col < width)
    row, channel = col // channels, col % channels
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, rounded.to(dweight_ptr.dtype.element_ty), row == 1)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, rounded.to(dbias_ptr.dtype.element_ty), row == 0)
    if dresidual_weight_ptr is not None:
        tl.store(dresidual_weight_ptr + channel, rounded.to(dresidual_weight_ptr.dtype.element_ty), row == 2)
    if dresidual_bias_ptr is not None:
        tl.store(dresidual_bias_ptr + channel, rounded.to(dresidual_bias_ptr.dtype.element_ty), row == 0)


@triton.jit
def _update(running_ptr, batch_ptr, channel, exists, decay, momentum):
    """Move running statistics towards those of the batch."""
    new = tl.load(running_ptr + channel, exists).to(tl.float32) * decay
    new += tl.load(batch_ptr + channel, exists) * momentum
    tl.store(running_ptr + channel, new.to(running_ptr.dtype.element_ty), exists)


@triton.jit
def update_running_stats_kernel(
    mean0_ptr, mean1_ptr, mean2_ptr, mean3_ptr,      # running statistics (channels), or None
    var0_ptr, var1_ptr, var2_ptr, var3_ptr,
    stats0_ptr, stats1_ptr, stats2_ptr, stats3_ptr,  # stats (5, channels) of each norm
    channels0, channels1, channels2, channels3,
    decay0, decay1, decay2, decay3,   # 1 - momentum
    momentum0, momentum1, momentum2, momentum3,
    MEAN: tl.constexpr, VAR: tl.constexpr, BLOCK: tl.constexpr,
):
    """Update the running statistics of up to four norms; the second program index is the norm."""
    norm = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if norm == 0:
        _update(mean0_ptr, stats0_ptr + MEAN * channels0, channel, channel < channels0, decay0, momentum0)
        _update(var0_ptr, stats0_ptr + VAR * channels0, channel, channel < channels0, decay0, momentum0)
    if mean1_ptr is not None:  # noqa: SIM102 - at compile time
        if norm == 1:
            _update(mean1_ptr, stats1_ptr + MEAN * channels1, channel, channel < channels1, decay1, momentum1)
            _update(var1_ptr, stats1_ptr + VAR * channels1, channel, channel < channels1, decay1, momentum1)
    if mean2_ptr is not None:  # noqa: SIM102 - at compile time
        if norm == 2:
            _update(mean2_ptr, stats2_ptr + MEAN * channels2, channel, channel < channels2, decay2, momentum2)
            _update(var2_ptr, stats2_ptr + VAR * channels2, channel, channel < channels2, decay2, momentum2)
    if mean3_ptr is not None:  # noqa: SIM102 - at compile time
        if norm == 3:
            _update(mean3_ptr, stats3_ptr + MEAN * channels3, channel, channel < channels3, decay3, momentum3)
            _update(var3_ptr, stats3_ptr + VAR * channels3, channel, channel < channels3, decay3, momentum3)
