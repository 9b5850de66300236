"""Kernels of ``act(bn(x) [+ residual])``: statistics, apply, backward reductions, and dx.

Batch norm: Ioffe and Szegedy (2015), https://arxiv.org/abs/1502.03167. Partial statistics are merged by the parallel
algorithm of Chan, Golub and LeVeque (1979). ``stats`` is defined in :mod:`fused_res.ops.schemas`; so are partial
statistics (count, mean, M2), to which those of tiles add a fourth row, the low part of the mean. To fold running
statistics (``FOLD``) is to compute ``scale`` and ``shift`` from them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_res.backends.triton.kernels.elementwise import (
    activate,
    activation_backward,
    channels_of,
    column_sum,
    mask_at,
    normalize,
    pack_bits,
    relu_grad_mask,
    tile_at,
    unpack_bits,
)

# fmt: off


@triton.jit
def _values_in(tile, rows, cols, CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return the number of elements of a tile for each of its channels."""
    if CHANNELS_LAST:
        count = tl.minimum(BLOCK_ROWS, rows - tile * BLOCK_ROWS)
    else:
        across = (cols + BLOCK_COLS - 1) // BLOCK_COLS
        count = tl.minimum(BLOCK_ROWS, rows - tile // across * BLOCK_ROWS)
        count *= tl.minimum(BLOCK_COLS, cols - tile % across * BLOCK_COLS)
    return count.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_part"])
def partials_kernel(
    x_ptr,         # rows x cols of each block
    partials_ptr,  # (parts, 4, channels): count, mean, M2, low part of the mean
    rows, cols, channels, blocks, tiles, tiles_per_part,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute the partial statistics of each part, from sums shifted by a pivot: the mean of the part's first tile.

    Cancellation is bounded: the k values of that tile, with the mean p, alone contribute at least ``k (p - mean)^2`` to
    M2. The subtracted term, ``n (p - mean)^2`` for the n values of the part, is thus at most n / k times the result,
    and n / k is the number of tiles in the part.
    """
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if LARGE:
        part = part.to(tl.int64)
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles)
    offsets, inside = tile_at(first, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
    x = tl.load(x_ptr + offsets, inside, other=0).to(ACC)
    count = _values_in(first, rows, cols, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS).to(ACC)
    pivot = column_sum(x, CHANNELS_LAST) / count
    d = tl.where(inside, x - pivot, 0)
    sum1, sum2 = d, d * d
    if CHANNELS_LAST:
        count = (tl.minimum(last * BLOCK_ROWS, rows) - first * BLOCK_ROWS).to(ACC)
    for tile in range(first + 1, last):
        offsets, inside = tile_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
        x = tl.load(x_ptr + offsets, inside, other=0).to(ACC)
        d = tl.where(inside, x - pivot, 0)
        sum1 += d
        sum2 = tl.fma(d, d, sum2)
        if not CHANNELS_LAST:
            count += _values_in(tile, rows, cols, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS)
    total = column_sum(sum1, CHANNELS_LAST)
    # TwoSum (Knuth): mean + rest == pivot + step exactly; rest is the low part of the mean.
    step = total / count
    mean = pivot + step
    taken = mean - pivot
    rest = (pivot - (mean - taken)) + (step - taken)
    m2 = tl.maximum(column_sum(sum2, CHANNELS_LAST) - total * (total / count), 0, propagate_nan=tl.PropagateNan.ALL)

    channel, exists = channels_of(block, channels, CHANNELS_LAST, BLOCK_COLS)
    out = partials_ptr + part * 4 * channels + channel
    tl.store(out, count + tl.zeros_like(mean), exists)
    tl.store(out + channels, mean, exists)
    tl.store(out + 2 * channels, m2, exists)
    tl.store(out + 3 * channels, rest, exists)


@triton.jit(do_not_specialize=["parts", "parts_per_group"])
def merge_partials_kernel(
    partials_ptr,  # (parts, ROWS, channels): count, mean, M2; with ROWS = 4, from tiles, also the low part of the mean
    merged_ptr,    # (ceil(parts / parts_per_group), 3, channels), or stats (5, channels) where FINAL
    weight_ptr, bias_ptr,  # (channels) or None
    parts, parts_per_group, channels,
    eps: tl.constexpr, FINAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):
    """Merge a group of partial statistics by Chan's formula, in float64 and in a fixed order.

    A first pass computes the mean of the group, a second one M2 around it. With FINAL the result is ``stats``.
    """
    group = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < channels
    first = group * parts_per_group
    last = tl.minimum(first + parts_per_group, parts)
    # The sum is shifted by the first mean, so that it stays small.
    pivot = tl.load(partials_ptr + (first * ROWS + 1) * channels + channel, exists, other=0).to(tl.float64)
    count = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for start in range(first, last, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < last)[:, None] & exists[None, :]
        at = partials_ptr + part[:, None] * ROWS * channels + channel[None, :]
        n = tl.load(at, inside, other=0).to(tl.float64)
        mean = tl.load(at + channels, inside, other=0).to(tl.float64)
        if ROWS == 4:
            mean += tl.load(at + 3 * channels, inside, other=0).to(tl.float64)
        count += tl.sum(n, axis=0)
        total += tl.sum(tl.where(n > 0, n * (mean - pivot[None, :]), 0), axis=0)
    # A part without values (a rank with an empty batch) has no mean, and all parts may be empty.
    mean_all = pivot + total / tl.maximum(count, 1)
    m2 = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for start in range(first, last, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < last)[:, None] & exists[None, :]
        at = partials_ptr + part[:, None] * ROWS * channels + channel[None, :]
        n = tl.load(at, inside, other=0).to(tl.float64)
        d = tl.load(at + channels, inside, other=0).to(tl.float64) - mean_all[None, :]
        if ROWS == 4:
            d += tl.load(at + 3 * channels, inside, other=0).to(tl.float64)
        within = tl.load(at + 2 * channels, inside, other=0).to(tl.float64)
        m2 += tl.sum(tl.where(n > 0, within + n * d * d, 0), axis=0)

    TYPE: tl.constexpr = merged_ptr.dtype.element_ty
    if FINAL:
        n = tl.maximum(count, 1)
        invstd = 1 / tl.sqrt(m2 / n + eps)
        scale = invstd
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + channel, exists, other=0).to(tl.float64)
        # The rounding error of the mean would appear in every element, times scale: the shift compensates for it.
        shift = (mean_all.to(TYPE).to(tl.float64) - mean_all) * scale
        if bias_ptr is not None:
            shift += tl.load(bias_ptr + channel, exists, other=0).to(tl.float64)
        unbiased = m2 / tl.maximum(count - 1, 1)
        out = merged_ptr + channel
        tl.store(out, mean_all.to(TYPE), exists)
        tl.store(out + channels, invstd.to(TYPE), exists)
        tl.store(out + 2 * channels, scale.to(TYPE), exists)
        tl.store(out + 3 * channels, shift.to(TYPE), exists)
        tl.store(out + 4 * channels, unbiased.to(TYPE), exists)
    else:
        out = merged_ptr + group * 3 * channels + channel
        tl.store(out, count.to(TYPE), exists)
        tl.store(out + channels, mean_all.to(TYPE), exists)
        tl.store(out + 2 * channels, m2.to(TYPE), exists)


@triton.jit
def load_norm(stats_ptr, channel, exists, channels):
    """Load mean, scale and shift of the channels."""
    at = stats_ptr + channel
    mean = tl.load(at, exists, other=0)
    scale = tl.load(at + 2 * channels, exists, other=0)
    shift = tl.load(at + 3 * channels, exists, other=0)
    return mean, scale, shift


@triton.jit
def _fold_running(
    stats_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, exists, channels, tile,
    eps: tl.constexpr, ACC: tl.constexpr,
):
    """Compute mean, scale and shift from running statistics; the first program of each block stores ``stats``."""
    mean = tl.load(mean_ptr + channel, exists, other=0).to(ACC)
    var = tl.load(var_ptr + channel, exists, other=1).to(ACC)
    if tl.float64 == ACC:
        invstd = 1 / tl.sqrt(var + eps)
    else:
        invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, exists, other=0).to(ACC)
    shift = tl.zeros_like(scale)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, exists, other=0).to(ACC)
    if stats_ptr is not None:
        out = stats_ptr + channel
        first = exists & (tl.zeros_like(channel) + tile == 0)
        tl.store(out, mean, first)
        tl.store(out + channels, invstd, first)
        tl.store(out + 2 * channels, scale, first)
        tl.store(out + 3 * channels, shift, first)
        tl.store(out + 4 * channels, var, first)
    return mean, scale, shift


@triton.jit
def fold_kernel(
    stats_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, channels,
    eps: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):
    """Compute ``stats`` from running statistics, for a norm that is applied in a consumer's operand prologue."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    _fold_running(
        stats_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, channel < channels, channels, 0, eps, ACC
    )


@triton.jit(do_not_specialize=["rows"])
def apply_kernel(
    x_ptr, y_ptr,
    residual_ptr,        # like x, or None
    residual_stats_ptr,  # (5, channels) to normalize the residual, or None
    stats_ptr,           # (5, channels): input; with FOLD an output, or None
    mean_ptr, var_ptr, weight_ptr, bias_ptr,  # FOLD: running statistics, (channels)
    mask_ptr,            # relu_mask, or None
    rows, cols, channels, blocks,
    eps: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Normalize one tile, add the residual, apply the activation, and store the output and the ReLU mask."""
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    channel, exists = channels_of(block, channels, CHANNELS_LAST, BLOCK_COLS)
    if FOLD:
        mean, scale, shift = _fold_running(
            stats_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, channel, exists, channels, tile, eps, ACC
        )
    else:
        mean, scale, shift = load_norm(stats_ptr, channel, exists, channels)
    offsets, inside = tile_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
    y = normalize(tl.load(x_ptr + offsets, inside, other=0).to(ACC), mean, scale, shift)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, inside, other=0).to(ACC)
        if residual_stats_ptr is not None:
            r_mean, r_scale, r_shift = load_norm(residual_stats_ptr, channel, exists, channels)
            residual = normalize(residual, r_mean, r_scale, r_shift)
        y += residual
    if mask_ptr is not None:
        at, there = mask_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
        tl.store(mask_ptr + at, pack_bits(relu_grad_mask(y) & inside, BLOCK_ROWS, BLOCK_COLS), there)
    y = activate(y, ACTIVATION, SLOPE)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _activation_input_grad(
    dy_ptr, mask_ptr, x, mean, scale, shift, offsets, inside, tile, block, rows, cols, channels,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ACC: tl.constexpr,
):
    """Load a tile of ``dy`` times ``act'(z)``: the stored ReLU mask, or recomputed from ``z = norm(x)``."""
    dy = tl.load(dy_ptr + offsets, inside, other=0).to(ACC)
    if mask_ptr is not None:
        at, there = mask_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
        dy = tl.where(unpack_bits(tl.load(mask_ptr + at, there, other=0), BLOCK_ROWS, BLOCK_COLS), dy, 0)
    elif ACTIVATION != 0:
        z = normalize(x, mean, scale, shift)
        dy = tl.where(inside, activation_backward(dy, z, ACTIVATION, SLOPE), 0)
    return dy


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_part"])
def sums_kernel(
    dy_ptr, x_ptr, stats_ptr,
    residual_ptr, residual_stats_ptr,  # input and stats of the residual's own norm, or None
    mask_ptr,
    partials_ptr,                      # (parts, 2, channels): partial sums dy, dy * xhat; a third row for the residual
    rows, cols, channels, blocks, tiles, tiles_per_part,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ACC: tl.constexpr,
):
    """Compute the reductions of each part, ``sum dy`` and ``sum dy * xhat``, of the activation's input gradient."""
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if LARGE:
        part = part.to(tl.int64)
    first = part * tiles_per_part
    channel, exists = channels_of(block, channels, CHANNELS_LAST, BLOCK_COLS)
    mean, scale, shift = load_norm(stats_ptr, channel, exists, channels)
    r_mean = mean
    if residual_ptr is not None:
        r_mean = tl.load(residual_stats_ptr + channel, exists, other=0)
    sum_dy = tl.zeros((BLOCK_ROWS, BLOCK_COLS), ACC)
    sum_dyx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), ACC)
    sum_dyr = tl.zeros((BLOCK_ROWS, BLOCK_COLS), ACC)
    for tile in range(first, tl.minimum(first + tiles_per_part, tiles)):
        offsets, inside = tile_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
        x = tl.load(x_ptr + offsets, inside, other=0).to(ACC)
        dy = _activation_input_grad(
            dy_ptr, mask_ptr, x, mean, scale, shift, offsets, inside, tile, block, rows, cols, channels,
            ACTIVATION, SLOPE, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS, ACC,
        )
        sum_dy += dy
        sum_dyx = tl.fma(dy, x - mean, sum_dyx)
        if residual_ptr is not None:
            sum_dyr = tl.fma(dy, tl.load(residual_ptr + offsets, inside, other=0).to(ACC) - r_mean, sum_dyr)

    ROWS: tl.constexpr = 2 if residual_ptr is None else 3
    out = partials_ptr + part * ROWS * channels + channel
    invstd = tl.load(stats_ptr + channels + channel, exists, other=0)
    tl.store(out, column_sum(sum_dy, CHANNELS_LAST), exists)
    tl.store(out + channels, column_sum(sum_dyx, CHANNELS_LAST) * invstd, exists)
    if residual_ptr is not None:
        r_invstd = tl.load(residual_stats_ptr + channels + channel, exists, other=0)
        tl.store(out + 2 * channels, column_sum(sum_dyr, CHANNELS_LAST) * r_invstd, exists)


@triton.jit(do_not_specialize=["parts", "parts_per_group"])
def merge_sums_kernel(
    partials_ptr,  # (parts, width): partial sums; width is rows times channels
    sums_ptr,      # (ceil(parts / parts_per_group), width)
    parts, parts_per_group, width,
    BLOCK_PARTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """Sum a group of partial sums, or of split-K accumulators, in float64 and in a fixed order."""
    group = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first = group * parts_per_group
    last = tl.minimum(first + parts_per_group, parts)
    total = tl.zeros((BLOCK_WIDTH,), tl.float64)
    for start in range(first, last, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < last)[:, None] & (col < width)[None, :]
        total += tl.sum(tl.load(partials_ptr + part[:, None] * width + col[None, :], inside, other=0).to(tl.float64), 0)
    tl.store(sums_ptr + group * width + col, total.to(sums_ptr.dtype.element_ty), col < width)


@triton.jit
def load_mean_terms(sums_ptr, row, stats_ptr, channel, exists, channels, count):
    """Load ``a`` and ``b`` of batch norm's input gradient, ``dz = scale * (dy - (a + b * (z - mean)))``."""
    invstd = tl.load(stats_ptr + channels + channel, exists, other=0)
    a = tl.load(sums_ptr + channel, exists, other=0) / count
    b = tl.load(sums_ptr + row * channels + channel, exists, other=0) / count * invstd
    return a, b


@triton.jit
def norm_input_grad(dy, z, mean, scale, a, b):
    """Return the gradient with respect to the norm's input from the masked gradient of its output."""
    return scale * (dy - tl.fma(z - mean, b, a))


@triton.jit(do_not_specialize=["rows", "count"])
def dx_kernel(
    dy_ptr, x_ptr, stats_ptr,
    residual_ptr, residual_stats_ptr,  # input and stats of the residual's own norm, or None
    mask_ptr,
    sums_ptr,                          # (2 or 3, channels)
    dx_ptr, dresidual_ptr,             # None if not requested
    rows, cols, channels, blocks, count,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, TRAINING: tl.constexpr, RESIDUAL_TRAINING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Compute one tile of the gradients with respect to the norm's input and the residual."""
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    channel, exists = channels_of(block, channels, CHANNELS_LAST, BLOCK_COLS)
    mean, scale, shift = load_norm(stats_ptr, channel, exists, channels)
    offsets, inside = tile_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
    x = tl.load(x_ptr + offsets, inside, other=0).to(ACC)
    dy = _activation_input_grad(
        dy_ptr, mask_ptr, x, mean, scale, shift, offsets, inside, tile, block, rows, cols, channels,
        ACTIVATION, SLOPE, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS, ACC,
    )
    if dx_ptr is not None:
        dx = dy * scale
        if TRAINING:
            a, b = load_mean_terms(sums_ptr, 1, stats_ptr, channel, exists, channels, count)
            dx = norm_input_grad(dy, x, mean, scale, a, b)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), inside)
    if dresidual_ptr is not None:
        dr = dy
        if residual_stats_ptr is not None:
            r_mean, r_scale, _ = load_norm(residual_stats_ptr, channel, exists, channels)
            dr = dy * r_scale
            if RESIDUAL_TRAINING:
                r = tl.load(residual_ptr + offsets, inside, other=0).to(ACC)
                a, b = load_mean_terms(sums_ptr, 2, residual_stats_ptr, channel, exists, channels, count)
                dr = norm_input_grad(dy, r, r_mean, r_scale, a, b)
        tl.store(dresidual_ptr + offsets, dr.to(dresidual_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def add_masked_kernel(
    into_ptr, grad_ptr, mask_ptr, rows, cols, channels, blocks,
    CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add one tile of the masked gradient to ``into`` in place."""
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    offsets, inside = tile_at(tile, block, rows, cols, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS)
    grad = _activation_input_grad(
        grad_ptr, mask_ptr, None, None, None, None, offsets, inside, tile, block, rows, cols, channels,
        0, 0.0, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS, ACC,
    )
    total = tl.load(into_ptr + offsets, inside, other=0).to(ACC) + grad
    tl.store(into_ptr + offsets, total.to(into_ptr.dtype.element_ty), inside)
