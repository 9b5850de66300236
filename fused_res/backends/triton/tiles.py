"""How an activation is cut into tiles, and tiles into parts: by its shape alone, so that the same input gives the same
bits on every GPU."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.ops.memory_format import is_channels_last

#: Programs that a reduction is cut into: several for each multiprocessor of a large GPU.
_PROGRAMS = 1024
#: Elements of a tile, and of a thread: two 16-byte loads of 16-bit numbers, so that enough bytes are under way.
_TILE = 4096
_SMALL_TILE = 1024
_THREAD = 16
#: One cache line of 16-bit channels.
_MOST_CHANNELS = 64
#: Pixels of a plane, with little left over at 56 x 56 and 28 x 28.
_MOST_PIXELS = 256


class Tiling(NamedTuple):
    rows: int
    cols: int
    channels: int
    channels_last: bool
    large: bool  # offsets do not fit 32 bits
    block_rows: int
    block_cols: int
    blocks: int  # of channels
    tiles: int  # of one block
    tiles_per_part: int
    parts: int

    @property
    def matrix(self) -> tuple[int, int, int, int]:
        return self.rows, self.cols, self.channels, self.blocks

    @property
    def shape(self) -> tuple[bool, bool, int, int]:
        return self.channels_last, self.large, self.block_rows, self.block_cols

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": max(1, min(8, self.block_rows * self.block_cols // (32 * _THREAD)))}


def tiling(x: Tensor) -> Tiling:
    """For ``x``, dense in one of the two layouts."""
    return _tiling(tuple(x.shape), is_channels_last(x))


@lru_cache(maxsize=4096)
def _tiling(shape: tuple[int, ...], channels_last: bool) -> Tiling:
    images, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    numel = images * channels * pixels
    if channels_last:
        rows, cols, most = images * pixels, channels, _MOST_CHANNELS
    else:
        rows, cols, most = images, pixels, _MOST_PIXELS
    block_cols = max(8, min(most, triton.next_power_of_2(cols)))  # 8: the mask's bytes
    tile = _TILE if numel >= _PROGRAMS * _TILE else _SMALL_TILE
    block_rows = min(max(1, tile // block_cols), triton.next_power_of_2(rows))
    across = triton.cdiv(cols, block_cols)
    blocks, tiles = (across, 1) if channels_last else (channels, across)
    tiles *= triton.cdiv(rows, block_rows)
    tiles_per_part = triton.cdiv(tiles, max(1, _PROGRAMS // blocks))
    parts = triton.cdiv(tiles, tiles_per_part)
    large = numel >= 2**31
    return Tiling(
        rows, cols, channels, channels_last, large, block_rows, block_cols, blocks, tiles, tiles_per_part, parts
    )


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
