"""Launch configuration of the GEMM kernels: block shape, warps, pipeline stages and number of split-K partitions.

The configuration depends on shape and dtype alone, so that results are bitwise equal on every GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

#: Programs that fill a large GPU; a GEMM with fewer output tiles uses split-K.
_TARGET_PROGRAMS = 256
_MAX_SPLIT_K = 16
#: Fewest K blocks in a partition for which split-K is worth its additional pass over memory.
_MIN_K_BLOCKS = 4
#: Largest ``(BLOCK_M, BLOCK_N)``, which eight warps compute, by register pressure: 16-bit operands that are used as
#: loaded; an operand prologue, or float32 operands, either of which takes registers from the accumulators; both. In
#: larger tiles accumulators are spilled, and with more warps Triton does not use tcgen05.
_MAX_BLOCK_MN = (128, 128), (128, 64), (64, 64)

#: The device of the weight gradient's cost model is an H200: 132 multiprocessors (SMs) at 1.9 GHz. Per clock and SM:
#: bytes from memory (4.3 TB/s) and from the L2 cache (6 TB/s), float32 instructions, and multiply-adds of ``tl.dot`` by
#: the operands' size in bytes, at 60 % of the tensor cores' peak (float32: TF32).
SMS = 132
_MEMORY_BYTES, _L2_BYTES, _INSTRUCTIONS, _MMA = 17, 24, 128, {2: 1200, 4: 600}
#: Instructions of the operand prologues for one element: ``dz`` from ``dy`` and ``z``, and the normalized input.
_DZ_INSTRUCTIONS, _NORM_INSTRUCTIONS = 12, 7
#: Clocks of barriers and of the way through shared memory in a K block, which only another program can hide; those in
#: which a program starts, fills its pipeline and stores its accumulators; and those to launch the merge of the splits.
_LATENCY_CLOCKS, _PROGRAM_CLOCKS, _MERGE_CLOCKS = 400, 2000, 5000
_MAX_WGRAD_SPLITS = 512


class WgradTile(NamedTuple):
    """Tile of the weight gradient, and how many of its programs an SM holds."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    resident: int  # by the registers that its variants use on sm_90


#: By the operands' size in bytes, the largest tiles that compile without spills for sm_80, sm_90 and sm_120 (on sm_100
#: one variant of 128x64 spills 8 bytes a thread), within the 99 KiB of shared memory of sm_120. A wide tile computes
#: each operand's prologue less often; two programs on an SM hide each other's latency.
WGRAD_TILES = {
    2: (
        WgradTile(128, 128, 32, 3, 1),
        WgradTile(128, 64, 64, 2, 1),
        WgradTile(64, 128, 64, 3, 1),
        WgradTile(64, 64, 64, 2, 2),
    ),
    4: (WgradTile(64, 64, 32, 3, 1),),
}


class GemmConfig(NamedTuple):
    """Work partition of a GEMM of size ``M x N x K``, and the launch options of its kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tiles_m: int
    tiles_n: int
    splits: int  # partitions of K: 1, or split-K
    k_blocks_per_split: int

    @property
    def block_shape(self) -> tuple[int, int, int]:
        return self.block_m, self.block_n, self.block_k

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@lru_cache(maxsize=4096)
def gemm_config(
    m: int, n: int, k_per_tap: int, taps: int, dtype: torch.dtype, high_register_pressure: bool = False
) -> GemmConfig:
    """Return the configuration of a GEMM of size ``m x n x (taps * k_per_tap)``.

    Args:
        m: rows of the output, ``M``.
        n: columns of the output, ``N``.
        k_per_tap: length of the reduction in one filter tap; K blocks do not cross taps.
        taps: number of filter taps, ``KH * KW`` of an implicit-GEMM convolution, else 1.
        dtype: dtype of the operands.
        high_register_pressure: whether an operand has a prologue, or statistics are computed from the accumulators,
            either of which takes registers. Default: False.
    """
    block_k = 32 if high_register_pressure or dtype == torch.float32 else 64
    max_m, max_n = _MAX_BLOCK_MN[high_register_pressure + (dtype == torch.float32)]
    block_n = min(max_n, max(16, triton.next_power_of_2(n)))
    block_m = max_m if m * triton.cdiv(n, block_n) >= max_m * _TARGET_PROGRAMS else 64
    block_m = min(block_m, max(16, triton.next_power_of_2(m)))
    block_k = min(block_k, max(16, triton.next_power_of_2(k_per_tap)))
    tiles_m, tiles_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    k_blocks = taps * triton.cdiv(k_per_tap, block_k)
    target_splits = _TARGET_PROGRAMS // (tiles_m * tiles_n) if tiles_m * tiles_n < _TARGET_PROGRAMS else 1
    splits = max(1, min(target_splits, _MAX_SPLIT_K, k_blocks // _MIN_K_BLOCKS))
    per_split = triton.cdiv(k_blocks, splits)
    num_warps = 8 if (block_m, block_n) == (max_m, max_n) else 4
    return GemmConfig(
        block_m, block_n, block_k, num_warps, 3, tiles_m, tiles_n, triton.cdiv(k_blocks, per_split), per_split
    )


@lru_cache(maxsize=4096)
def wgrad_config(m: int, n: int, pixels: int, dtype: torch.dtype) -> GemmConfig:
    """Return the configuration of the weight gradient, a GEMM of size ``m x n x pixels`` with few output tiles.

    Of all tiles and numbers of splits it has the shortest modelled time. More splits fill the SMs and shorten the
    serial loop of each program; each split costs ``m * n`` float32 accumulators that are written and read again.

    Args:
        m: output channels, rows of the weight.
        n: input channels, columns of the weight.
        pixels: pixels of the convolution's output over which the gradient is reduced.
        dtype: dtype of the operands.
    """
    m_padded, n_padded = max(16, triton.next_power_of_2(m)), max(16, triton.next_power_of_2(n))
    best, fewest_clocks = None, math.inf
    *larger, smallest = WGRAD_TILES[dtype.itemsize]
    for tile in (*(tile for tile in larger if tile.block_m <= m_padded and tile.block_n <= n_padded), smallest):
        block_m, block_n = min(tile.block_m, m_padded), min(tile.block_n, n_padded)
        block_k = min(tile.block_k, max(16, triton.next_power_of_2(pixels)))
        tiles_m, tiles_n, k_blocks = _ceil_div(m, block_m), _ceil_div(n, block_n), _ceil_div(pixels, block_k)
        block_clocks = _wgrad_block_clocks((block_m, block_n, block_k), tile.resident, m, n, dtype.itemsize)
        for target in range(1, min(_MAX_WGRAD_SPLITS, k_blocks) + 1):
            per_split = _ceil_div(k_blocks, target)
            splits = _ceil_div(k_blocks, per_split)
            waves = _ceil_div(tiles_m * tiles_n * splits, SMS * tile.resident)
            clocks = waves * (per_split * block_clocks + _PROGRAM_CLOCKS)
            if splits > 1:
                clocks += _MERGE_CLOCKS + 2 * splits * m * n * 4 / (SMS * _MEMORY_BYTES)
            if clocks < fewest_clocks:
                num_warps = 8 if block_m * block_n >= 64 * 64 else 4
                blocks = block_m, block_n, block_k
                best = GemmConfig(*blocks, num_warps, tile.num_stages, tiles_m, tiles_n, splits, per_split)
                fewest_clocks = clocks
    assert best is not None
    return best


def _wgrad_block_clocks(blocks: tuple[int, int, int], resident: int, m: int, n: int, itemsize: int) -> float:
    """Return the modelled clocks in which each of the programs of an SM processes one K block."""
    block_m, block_n, block_k = blocks
    prologues = (_DZ_INSTRUCTIONS * block_m + _NORM_INSTRUCTIONS * block_n) * block_k / _INSTRUCTIONS
    products = block_m * block_n * block_k / _MMA[itemsize]
    # A program reads all of its operands through the L2 cache, which has read each of them from memory once.
    l2_bytes = (2 * block_m + block_n) * block_k * itemsize
    memory_bytes = (2 * block_m * min(1, block_n / n) + block_n * min(1, block_m / m)) * block_k * itemsize
    memory = max(l2_bytes / _L2_BYTES, memory_bytes / _MEMORY_BYTES)
    return max(resident * memory, resident * (prologues + products), prologues + products + _LATENCY_CLOCKS)


def _ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up; Triton's function takes 30 times as long."""
    return -(-a // b)


def input_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` of ``tl.dot``: float32 unless PyTorch's setting for convolutions allows TF32."""
    # This attribute reflects the older `allow_tf32`, too; reading `allow_tf32` raises after this one was set.
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
