"""Max pooling with an optional batch norm and ReLU prologue, forward and backward.

The forward saves the position in the window of each maximum as one byte; the backward gathers, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_res.backends.triton.kernels.batch_norm_act import load_norm
from fused_res.backends.triton.kernels.elementwise import normalize, relu

# fmt: off


@triton.jit
def _position(index, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Return image, channel, row and column of the element at offset ``index``."""
    if CHANNELS_LAST:
        channel, pixel = index % channels, index // channels
        image = pixel // (height * width)
    else:
        pixel = index % (height * width)
        channel, image = index // (height * width) % channels, index // (height * width) // channels
    return image, channel, pixel // width % height, pixel % width


@triton.jit
def _offset(image, channel, row, col, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Return the offset of an element: the inverse of :func:`_position`."""
    if CHANNELS_LAST:
        return ((image * height + row) * width + col) * channels + channel
    return ((image * channels + channel) * height + row) * width + col


@triton.jit(do_not_specialize=["numel", "H", "W", "P", "Q"])
def max_pool_forward_kernel(
    x_ptr, stats_ptr, y_ptr, indices_ptr,
    numel, channels, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    image, channel, p, q = _position(index, channels, P, Q, CHANNELS_LAST)
    exists = index < numel
    if stats_ptr is not None:
        mean, scale, shift = load_norm(stats_ptr, channel, exists, channels)
    best = tl.full((BLOCK,), float("-inf"), ACC)
    at = tl.zeros((BLOCK,), tl.int32)  # argmax: position of the maximum in the window
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            h, w = p * STRIDE_H - PAD_H + r, q * STRIDE_W - PAD_W + s
            inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x = tl.load(x_ptr + _offset(image, channel, h, w, channels, H, W, CHANNELS_LAST), inside, other=0).to(ACC)
            if stats_ptr is not None:
                x = normalize(x, mean, scale, shift)
                if RELU:
                    x = relu(x)
            # Round before comparing: among values that are equal in the output's dtype the first gets the gradient.
            x = x.to(y_ptr.dtype.element_ty).to(ACC)
            better = inside & ((x > best) | (x != x))
            best = tl.where(better, x, best)
            at = tl.where(better, r * S + s, at)
    tl.store(y_ptr + index, best.to(y_ptr.dtype.element_ty), exists)
    tl.store(indices_ptr + index, at.to(tl.uint8), exists)


@triton.jit(do_not_specialize=["numel", "H", "W", "P", "Q"])
def max_pool_backward_kernel(
    dy_ptr, indices_ptr, dx_ptr,
    numel, channels, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, LARGE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gather, for every input position, the gradients of the windows that contain it, in a fixed order."""
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    index = program * BLOCK + tl.arange(0, BLOCK)
    image, channel, h, w = _position(index, channels, H, W, CHANNELS_LAST)
    exists = index < numel
    dx = tl.zeros((BLOCK,), ACC)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            top, left = h + PAD_H - r, w + PAD_W - s
            p, q = top // STRIDE_H, left // STRIDE_W
            inside = exists & (top >= 0) & (left >= 0) & (top % STRIDE_H == 0) & (left % STRIDE_W == 0)
            inside &= (p < P) & (q < Q)
            at = _offset(image, channel, p, q, channels, P, Q, CHANNELS_LAST)
            chosen = tl.load(indices_ptr + at, inside, other=255) == r * S + s
            dx += tl.load(dy_ptr + at, inside & chosen, other=0).to(ACC)
    tl.store(dx_ptr + index, dx.to(dx_ptr.dtype.element_ty), exists)
