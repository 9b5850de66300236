"""How a matrix product is cut: block sizes, warps, pipeline stages, and parts of the sum where tiles are few.

By shape and dtype alone: the same input gives the same bits on every GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

#: Programs that keep a large GPU busy; fewer tiles than this, and the sum is split.
_PROGRAMS = 256
_MOST_SPLITS = 16
#: Chunks of the sum that a split is worth its pass over memory for.
_LEAST_CHUNKS = 4
#: Largest tiles (rows, columns), those of eight warps: for 16-bit operands as they are in memory; where an operand is
#: formed, or of float32, either of which takes registers from the sums; where it is both. Beyond, sums are spilled, and
#: with more warps Triton leaves tcgen05 alone.
_TILES = (128, 128), (128, 64), (64, 64)


class Product(NamedTuple):
    block_rows: int
    block_cols: int
    block_k: int
    num_warps: int
    num_stages: int
    row_tiles: int
    col_tiles: int
    splits: int
    chunks_per_split: int

    @property
    def blocks(self) -> tuple[int, int, int]:
        return self.block_rows, self.block_cols, self.block_k

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@lru_cache(maxsize=4096)
def product(rows: int, cols: int, chunk_length: int, taps: int, dtype: torch.dtype, formed: bool = False) -> Product:
    """For ``rows x cols`` sums of ``taps`` times ``chunk_length`` terms.

    ``formed``: an operand is computed from what is loaded, or statistics from the sums, which takes registers.
    """
    block_k = 32 if formed or dtype == torch.float32 else 64
    most_rows, most_cols = _TILES[formed + (dtype == torch.float32)]
    block_cols = min(most_cols, max(16, triton.next_power_of_2(cols)))
    block_rows = most_rows if rows * triton.cdiv(cols, block_cols) >= most_rows * _PROGRAMS else 64
    block_rows = min(block_rows, max(16, triton.next_power_of_2(rows)))
    block_k = min(block_k, max(16, triton.next_power_of_2(chunk_length)))
    row_tiles, col_tiles = triton.cdiv(rows, block_rows), triton.cdiv(cols, block_cols)
    chunks = taps * triton.cdiv(chunk_length, block_k)
    wanted = _PROGRAMS // (row_tiles * col_tiles) if row_tiles * col_tiles < _PROGRAMS else 1
    splits = max(1, min(wanted, _MOST_SPLITS, chunks // _LEAST_CHUNKS))
    per_split = triton.cdiv(chunks, splits)
    num_warps = 8 if (block_rows, block_cols) == (most_rows, most_cols) else 4
    return Product(
        block_rows, block_cols, block_k, num_warps, 3, row_tiles, col_tiles, triton.cdiv(chunks, per_split), per_split
    )


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless PyTorch's own switch for convolutions allows TF32."""
    # Also right where the older `allow_tf32` was set; that raises where this was.
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
