"""Device functions shared by all kernels: batch norm's normalization, ReLU and its mask, and tile addressing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalize(x, mean, scale, shift):
    """Return ``fma(x - mean, scale, shift)``.

    Forward, prologues and backward use this one formula, so that all of them compute the same sign for the ReLU.
    """
    return tl.fma(x - mean, scale, shift)


@triton.jit
def relu(y):
    """Return ``max(y, 0)``; NaN is propagated, as in PyTorch."""
    return tl.where(y <= 0, 0, y)


@triton.jit
def relu_grad_mask(y):
    """Return where ReLU passes the gradient: where ``y`` is positive or NaN."""
    return (y <= 0) == 0


@triton.jit
def sigmoid(z):
    """Return ``1 / (1 + exp(-z))``."""
    return 1 / (1 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Return ``act(z)``. ACTIVATION is the index in ``fused_res.ops.checks.ACTIVATIONS``, SLOPE that of leaky ReLU."""
    if ACTIVATION == 1:
        z = relu(z)
    elif ACTIVATION == 2:
        z = tl.where(z >= 6, 6, relu(z))
    elif ACTIVATION == 3:
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == 4:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def activation_backward(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Return ``dy * act'(z)``, with the derivatives of :mod:`fused_res.ops.schemas`."""
    if ACTIVATION == 1:
        dy = tl.where(relu_grad_mask(z), dy, 0)
    elif ACTIVATION == 2:
        dy = tl.where((z <= 0) | (z >= 6), 0, dy)
    elif ACTIVATION == 3:
        dy = tl.where(z > 0, dy, dy * SLOPE)
    elif ACTIVATION == 4:
        s = sigmoid(z)
        dy = dy * (s * tl.fma(z, 1 - s, tl.full(z.shape, 1, z.dtype)))
    return dy


@triton.jit
def pack_bits(flags, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pack ``(ROWS, COLS)`` booleans into ``(ROWS, COLS / 8)`` bytes, least significant bit first."""
    bits = tl.reshape(flags.to(tl.int32), (ROWS, COLS // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(bytes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Unpack ``(ROWS, COLS / 8)`` bytes into ``(ROWS, COLS)`` booleans, least significant bit first."""
    bits = (bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLS)) != 0


@triton.jit
def tile_at(
    tile, block, rows, cols, channels, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Return the element offsets of tile ``tile`` of channel block ``block``, and which of them are within bounds.

    A block is ``BLOCK_COLS`` channels in channels_last memory and one channel in contiguous memory.
    """
    if LARGE:
        tile = tile.to(tl.int64)
    if CHANNELS_LAST:
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        col = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        offsets = row[:, None] * cols + col[None, :]
    else:
        across = (cols + BLOCK_COLS - 1) // BLOCK_COLS
        row = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        col = tile % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        offsets = (row * channels + block)[:, None] * cols + col[None, :]
    return offsets, (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def mask_at(
    tile, block, rows, cols, channels, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Return the byte offsets of tile ``tile`` (see :func:`tile_at`) in a ``relu_mask``, and which are within bounds.

    The rows of the mask are padded to whole bytes.
    """
    return tile_at(
        tile, block, rows, (cols + 7) // 8, channels, CHANNELS_LAST, LARGE, BLOCK_ROWS, BLOCK_COLS // 8
    )  # fmt: skip


@triton.jit
def channels_of(block, channels, CHANNELS_LAST: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return a block's channels, as a row that broadcasts against its tiles, and which of them exist."""
    if CHANNELS_LAST:
        channel = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    else:
        channel = block + tl.zeros((1, 1), tl.int32)
    return channel, channel < channels


@triton.jit
def column_sum(x, CHANNELS_LAST: tl.constexpr):
    """Return the per-channel sums of a tile, as a row."""
    total = tl.sum(x, axis=0)[None, :]
    if not CHANNELS_LAST:
        total = tl.sum(total, axis=1)[:, None]
    return total
