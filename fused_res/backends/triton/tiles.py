"""Tiling of activations, and the work partition of reductions over them.

Both depend on the shape alone, so that results are bitwise equal on every GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.ops.memory_format import is_channels_last

#: Programs of a reduction: several for each multiprocessor of a large GPU.
_TARGET_PROGRAMS = 1024
#: Elements of a tile and of a thread: two 16-byte loads of 16-bit values a thread keep enough bytes in flight.
_TILE_ELEMENTS = 4096
_SMALL_TILE_ELEMENTS = 1024
_ELEMENTS_PER_THREAD = 16
#: Channels of a channels_last tile: one 128-byte cache line of 16-bit values.
_MAX_BLOCK_CHANNELS = 64
#: Pixels of a contiguous tile: 6 % of the lanes are masked off at 56 x 56, 23 % at 28 x 28.
_MAX_BLOCK_PIXELS = 256


class Tiling(NamedTuple):
    """Tiling of an activation that is viewed as one matrix per channel block.

    In channels_last memory, rows are pixels, columns channels, and a block is ``block_cols`` channels. In contiguous
    memory, rows are images, columns the pixels of one channel, and a block is one channel. A reduction has ``parts``
    parts per block, and one program per part and block.
    """

    rows: int
    cols: int
    channels: int
    channels_last: bool
    int64_offsets: bool  # element offsets do not fit 32 bits
    block_rows: int
    block_cols: int
    blocks: int  # channel blocks
    tiles: int  # tiles of one channel block
    tiles_per_part: int
    parts: int

    @property
    def extents(self) -> tuple[int, int, int, int]:
        """The kernel arguments ``rows, cols, channels, blocks``."""
        return self.rows, self.cols, self.channels, self.blocks

    @property
    def constexprs(self) -> tuple[bool, bool, int, int]:
        """The kernel arguments ``CHANNELS_LAST, LARGE (int64_offsets), BLOCK_ROWS, BLOCK_COLS``."""
        return self.channels_last, self.int64_offsets, self.block_rows, self.block_cols

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": max(1, min(8, self.block_rows * self.block_cols // (32 * _ELEMENTS_PER_THREAD)))}


def choose_tiling(x: Tensor) -> Tiling:
    """Return the tiling of ``x``, which is dense in channels_last or contiguous memory."""
    return _choose_tiling(tuple(x.shape), is_channels_last(x))


@lru_cache(maxsize=4096)
def _choose_tiling(shape: tuple[int, ...], channels_last: bool) -> Tiling:
    images, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    numel = images * channels * pixels
    if channels_last:
        rows, cols, max_cols = images * pixels, channels, _MAX_BLOCK_CHANNELS
    else:
        rows, cols, max_cols = images, pixels, _MAX_BLOCK_PIXELS
    block_cols = max(8, min(max_cols, triton.next_power_of_2(cols)))  # a byte of the ReLU mask is 8 elements
    tile_elements = _TILE_ELEMENTS if numel >= _TARGET_PROGRAMS * _TILE_ELEMENTS else _SMALL_TILE_ELEMENTS
    block_rows = min(max(1, tile_elements // block_cols), triton.next_power_of_2(rows))
    col_tiles = triton.cdiv(cols, block_cols)
    blocks, tiles = (col_tiles, 1) if channels_last else (channels, col_tiles)
    tiles *= triton.cdiv(rows, block_rows)
    tiles_per_part = triton.cdiv(tiles, max(1, _TARGET_PROGRAMS // blocks))
    parts = triton.cdiv(tiles, tiles_per_part)
    int64_offsets = numel >= 2**31
    return Tiling(
        rows, cols, channels, channels_last, int64_offsets, block_rows, block_cols, blocks, tiles, tiles_per_part, parts
    )


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which kernels accumulate values of ``dtype``: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
