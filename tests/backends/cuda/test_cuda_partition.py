"""Work partition of the CUDA C++ GEMMs (``csrc/cuda/gemm_partition.h``), for the 1x1 convolutions of ResNet-50.

The header is compiled alone: the partition depends on shape and dtype, on no GPU and on no library.
"""

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE = """
#include "cuda/gemm_partition.h"
using namespace fused_res::cuda;
extern "C" void partition(int64_t m, int64_t n, int64_t k, int math_mode, bool aligned, bool weight, int64_t* out) {
  const GemmProblem problem = {m, n, k, 1, static_cast<MathMode>(math_mode), aligned, weight};
  const GemmPartition found = weight ? partition_wgrad_gemm(problem) : partition_activation_gemm(problem, true);
  const int64_t values[] = {tile_rows(found.size),  tile_cols(found.size), found.splits,
                            found.steps_per_split, found.threadblocks, resident_wgrad_blocks(problem, found.size)};
  std::copy(values, values + 6, out);
}
// Return the modeled time of a partition, relative to the least one of all tiles and numbers of splits.
extern "C" double relative_time(int64_t m, int64_t n, int64_t k, int math_mode) {
  const GemmProblem problem = {m, n, k, 1, static_cast<MathMode>(math_mode), true, true};
  double least = 1e9;
  for (const TileSize size : {TileSize::k128x128, TileSize::k128x64, TileSize::k64x64}) {
    if (!problem.is_instantiated(size) || is_half_empty(problem, size)) continue;
    for (int64_t splits = 1; splits <= std::min<int64_t>(512, max_splits(problem)); ++splits)
      least = std::min(least, modeled_wgrad_time(problem, make_gemm_partition(problem, size, splits)));
  }
  return modeled_wgrad_time(problem, partition_wgrad_gemm(problem)) / least;
}
"""
MATH_MODES = ("bfloat16", "float16", "tf32", "float32")
#: Output channels, input channels and output pixels per image of the 1x1 convolutions of ResNet-50.
RESNET50 = [
    *[(64, 64, 56), (256, 64, 56), (64, 256, 56), (128, 256, 56), (512, 128, 28), (512, 256, 28), (128, 512, 28)],
    *[(256, 512, 28), (1024, 256, 14), (1024, 512, 14), (256, 1024, 14), (512, 1024, 14), (2048, 512, 7)],
    *[(2048, 1024, 7), (512, 2048, 7)],
]


class Partition(NamedTuple):
    rows: int
    cols: int
    splits: int
    steps_per_split: int
    blocks: int
    resident: int


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Partition]:
    path = tmp_path_factory.mktemp("partition") / "partition.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    library = ctypes.CDLL(str(path))
    library.relative_time.restype = ctypes.c_double

    def relative_time(m, n, k, math_mode):
        return library.relative_time(*map(ctypes.c_int64, (m, n, k)), MATH_MODES.index(math_mode))

    def call(m, n, k, math_mode="bfloat16", aligned=True, weight=True):
        out = (ctypes.c_int64 * 6)()
        library.partition(*map(ctypes.c_int64, (m, n, k)), MATH_MODES.index(math_mode), aligned, weight, out)
        return Partition(*out)

    call.relative_time = relative_time
    return call


def steps(k: int, math_mode: str) -> int:
    return -(-k * (2 if math_mode.endswith("16") else 4) // 64)


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize(("outputs", "channels", "size"), RESNET50)
@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_weight_gradients_of_resnet50_fill_the_gpu(partition, math_mode, outputs, channels, size, batch):
    k = batch * size**2
    found = partition(outputs, channels, k, math_mode)
    tiles = -(-outputs // found.rows) * -(-channels // found.cols)
    waves = -(-found.blocks // found.resident)
    assert found.blocks == tiles * found.splits
    # Splits of 8 iterations are the shortest ones: 64 x 64 outputs at batch 32 have no more of them.
    assert found.blocks / (waves * found.resident) >= 0.85 or found.steps_per_split == 8
    assert found.steps_per_split >= 8 and found.splits <= 512
    assert found.splits * found.steps_per_split >= steps(k, math_mode) > (found.splits - 1) * found.steps_per_split
    assert partition.relative_time(outputs, channels, k, math_mode) < 1.03


def test_long_weight_gradients_have_many_splits(partition):
    """64 x 64 outputs over the pixels of layer 1 at batch 256: one tile."""
    found = partition(64, 64, 256 * 56**2)
    assert (found.rows, found.cols) == (64, 64) and found.splits > 500


@pytest.mark.parametrize("math_mode", MATH_MODES)
@pytest.mark.parametrize("weight", [False, True])
def test_tiles_have_no_empty_half(partition, weight, math_mode):
    """A tile of 128 rows has more than 64 valid ones, and a tile of 128 columns too."""
    chosen = set()
    for m, n, k in itertools.product((1, 64, 65, 300, 10**7), (1, 64, 65, 300, 10**5), (1, 64, 10**6)):
        for aligned in (False, True):
            found = partition(m, n, k, math_mode, aligned, weight)
            assert (m > 64 or found.rows == 64) and (n > 64 or found.cols == 64)
            assert aligned or found.rows == found.cols == 64
            assert found.splits == 1 or found.steps_per_split >= 8
            chosen.add((found.rows, found.cols))
    large = {"float32": {(128, 64)}, "tf32": {(128, 64), (128, 128)}}.get(math_mode, {(128, 64), (128, 128)})
    assert chosen == {(64, 64)} | (set() if weight and math_mode in ("tf32", "float32") else large)
