"""Tiling of activations, and the work partition of reductions over them.

Both depend on the shape alone, so that results are bitwise equal on every GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.ops.memory_format import is_channels_last, to_dense_layout, to_memory_format

#: Most programs of a reduction: several for each multiprocessor of a large GPU.
_MAX_PROGRAMS = 1584
#: Programs that run at once on the GPU that reductions are partitioned for, an H200: 132 multiprocessors with two,
#: three or four each, by the registers of the kernel's variants.
_RESIDENT_PROGRAMS = 132 * 2, 132 * 3, 132 * 4
#: Elements of a tile and of a thread: two 16-byte loads of 16-bit values a thread keep enough bytes in flight.
_TILE_ELEMENTS = 4096
_SMALL_TILE_ELEMENTS = 1024
_ELEMENTS_PER_THREAD = 16
#: Channels of a channels_last tile: one 128-byte cache line of 16-bit values.
_MAX_BLOCK_CHANNELS = 64
#: Pixels of a contiguous tile: 6 % of the lanes are masked off at 56 x 56, 23 % at 28 x 28.
_MAX_BLOCK_PIXELS = 256


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tiling of an activation that is viewed as one matrix per channel block.

    In channels_last memory, rows are pixels, columns channels, and a block is ``block_cols`` channels. In contiguous
    memory, rows are images, columns the pixels of one channel, and a block is one channel. A reduction has ``parts``
    parts per block, and one program per part and block. Tilings are cached, and compared by identity.
    """

    numel: int
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

    @cached_property
    def mask_shape(self) -> tuple[int, int]:
        """Shape of the ``relu_mask``: one row for each row of the channel blocks side by side."""
        rows = self.rows if self.channels_last else self.rows * self.channels
        return rows, (self.cols + 7) // 8

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": max(1, min(8, self.block_rows * self.block_cols // (32 * _ELEMENTS_PER_THREAD)))}


def dense_tiling(x: Tensor) -> tuple[Tensor, Tiling]:
    """Return ``x`` as a dense tensor in the layout of :func:`is_channels_last`, copied if necessary, and its tiling."""
    tiling = _tiling_of(x.shape, x.stride())
    if tiling is None:
        x = to_dense_layout(x)
        tiling = _tiling_of(x.shape, x.stride())
        assert tiling is not None
    return x, tiling


def in_layout_of(x: Tensor, dense: Tensor, tiling: Tiling) -> Tensor:
    """Return ``x``, of the shape of ``dense``, in the memory format of ``dense``, whose tiling is given."""
    return x if x.stride() == dense.stride() else to_memory_format(x, tiling.channels_last)


@lru_cache(maxsize=4096)
def _tiling_of(shape: Sequence[int], strides: Sequence[int]) -> Tiling | None:
    """Return the tiling of a tensor with this shape and these strides; None if it is not dense."""
    x = torch.empty_strided(shape, strides, device="meta")
    return _choose_tiling(tuple(shape), is_channels_last(x)) if to_dense_layout(x) is x else None


@lru_cache(maxsize=4096)
def _choose_tiling(shape: tuple[int, ...], channels_last: bool) -> Tiling:
    images, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    numel = images * channels * pixels
    if not numel:  # nothing is launched
        images, channels, pixels = max(images, 1), max(channels, 1), max(pixels, 1)
    if channels_last:
        rows, cols, max_cols = images * pixels, channels, _MAX_BLOCK_CHANNELS
    else:
        rows, cols, max_cols = images, pixels, _MAX_BLOCK_PIXELS
    block_cols = max(8, min(max_cols, triton.next_power_of_2(cols)))  # a byte of the ReLU mask is 8 elements
    tile_elements = _TILE_ELEMENTS if numel >= 1024 * _TILE_ELEMENTS else _SMALL_TILE_ELEMENTS
    block_rows = min(max(1, tile_elements // block_cols), triton.next_power_of_2(rows))
    col_tiles = triton.cdiv(cols, block_cols)
    blocks, tiles = (col_tiles, 1) if channels_last else (channels, col_tiles)
    tiles *= triton.cdiv(rows, block_rows)
    tiles_per_part = _choose_tiles_per_part(tiles, blocks)
    parts = triton.cdiv(tiles, tiles_per_part)
    int64_offsets = numel >= 2**31
    return Tiling(
        numel, rows, cols, channels, channels_last, int64_offsets, block_rows, block_cols,
        blocks, tiles, tiles_per_part, parts,
    )  # fmt: skip


def _choose_tiles_per_part(tiles: int, blocks: int) -> int:
    """Return the number of tiles per part that leaves the least of the last wave of programs idle."""
    fewest = -(-tiles // max(1, _MAX_PROGRAMS // blocks))

    def idle(tiles_per_part: int) -> float:
        programs = blocks * -(-tiles // tiles_per_part)
        times = (-(-programs // resident) * resident * tiles_per_part for resident in _RESIDENT_PROGRAMS)
        return max(times) / (blocks * tiles)

    return min(range(fewest, 2 * fewest + 1), key=idle)


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which kernels accumulate values of ``dtype``: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
