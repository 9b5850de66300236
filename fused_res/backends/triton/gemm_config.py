"""Launch configuration of the GEMM kernels: block shape, warps, pipeline stages and number of split-K partitions.

The configuration depends on shape and dtype alone, so that results are bitwise equal on every GPU.
"""

from __future__ import annotations

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


def input_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` of ``tl.dot``: float32 unless PyTorch's setting for convolutions allows TF32."""
    # This attribute reflects the older `allow_tf32`, too; reading `allow_tf32` raises after this one was set.
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
