// Host-side GEMM problem description, tile selection and split-K partition. The partition depends on shape
// and dtype alone, never on the GPU, so the same input gives bitwise the same result on every device.
#pragma once

#include <algorithm>

#include "cuda/kernel_args.h"

namespace fused_res::cuda {

// Operand precision of the multiplications; accumulation is always float32. kFloat32 is IEEE float32 on the
// CUDA cores (SIMT), the others use tensor cores. kTf32 reads float32 and rounds it to TF32.
enum class MathMode { kBFloat16, kFloat16, kTf32, kFloat32 };

// Threadblock tile, M x N, largest first.
enum class TileSize { k128x128, k128x64, k64x64 };

// Extent of one pipeline stage along K: two k-steps of mma.sync, 32 bytes each.
constexpr int kTileKBytes = 64;

struct GemmPartition {
  TileSize size;
  int64_t row_tiles, col_tiles;
  int64_t splits, steps_per_split;  // split-K: number of splits, main loop iterations in each
  int64_t threadblocks;             // of all groups and splits
};

constexpr int64_t tile_rows(TileSize size) { return size == TileSize::k64x64 ? 64 : 128; }
constexpr int64_t tile_cols(TileSize size) { return size == TileSize::k128x128 ? 128 : 64; }
constexpr int64_t element_size(MathMode math_mode) { return math_mode < MathMode::kTf32 ? 2 : 4; }

struct GemmProblem {
  int64_t m, n, k;
  int64_t groups;  // GEMMs of this shape in one launch
  MathMode math_mode;
  bool aligned;        // the operands allow 16-byte vectorized loads
  bool grad_prologue;  // dgrad or wgrad: operands have the prologues of operand_prologue.cuh

  // The largest tile that is instantiated. Unaligned operands only have the smallest one. 4-byte elements
  // with `grad_prologue`, and SIMT accumulators, would exceed the register budget of larger tiles.
  TileSize max_tile() const {
    if (!aligned || (grad_prologue && element_size(math_mode) == 4)) return TileSize::k64x64;
    return math_mode == MathMode::kFloat32 ? TileSize::k128x64 : TileSize::k128x128;
  }
  bool is_instantiated(TileSize size) const { return size >= max_tile(); }  // the enum descends in size
};

// Upper bound of the number of splits of K: a split needs at least kMinStepsPerSplit main loop iterations to
// pay for the extra pass over memory.
inline int64_t max_splits(const GemmProblem& problem) {
  constexpr int64_t kMinStepsPerSplit = 8;
  return std::max<int64_t>(
      1, ceil_div(problem.k * element_size(problem.math_mode), kTileKBytes) / kMinStepsPerSplit);
}

inline GemmPartition make_gemm_partition(const GemmProblem& problem, TileSize size, int64_t split_limit) {
  const int64_t row_tiles = ceil_div(problem.m, tile_rows(size));
  const int64_t col_tiles = ceil_div(problem.n, tile_cols(size));
  const int64_t steps = ceil_div(problem.k * element_size(problem.math_mode), kTileKBytes);
  const int64_t steps_per_split = ceil_div(steps, std::max<int64_t>(1, split_limit));
  const int64_t splits = ceil_div(steps, steps_per_split);
  return {size,   row_tiles,       col_tiles,
          splits, steps_per_split, row_tiles * col_tiles * problem.groups * splits};
}

// Whether a tile of half the rows or columns would cover the output as well.
inline bool is_half_empty(const GemmProblem& problem, TileSize size) {
  return (problem.m <= 64 && tile_rows(size) == 128) || (problem.n <= 64 && tile_cols(size) == 128);
}

// Partition a GEMM whose output is an activation (forward, dgrad): the largest tile with enough threadblocks
// to fill a large GPU, and, where even the smallest one has too few, split-K. Smaller tiles are preferred to
// split-K, since the split-K workspace of an activation is large.
//
// A tile that leaves less of its last wave idle does not pay. At 7x7, batch 256, K = 2048, N = 512, in
// bfloat16 on 132 multiprocessors: 392 threadblocks of 128x128 in 2 waves of 264 (74 %) load 411 MB, 69 us at
// the L2's 6 TB/s, 92 us with the idle part; 1568 of 64x64 (99 %) load 822 MB, 137 us; two splits of 128x128
// (99 %) take 70 us, and 24 us more for the 103 MB that the workspace moves.
inline GemmPartition partition_activation_gemm(const GemmProblem& problem, bool allow_split_k) {
  constexpr int64_t kTargetBlocks = 256, kMaxSplits = 16;
  const auto unsplit = [&](TileSize size) { return make_gemm_partition(problem, size, 1); };
  const auto is_usable = [&](TileSize size) {
    return problem.is_instantiated(size) && !is_half_empty(problem, size) &&
           unsplit(size).threadblocks >= kTargetBlocks;
  };
  const TileSize size = is_usable(TileSize::k128x128)  ? TileSize::k128x128
                        : is_usable(TileSize::k128x64) ? TileSize::k128x64
                                                       : TileSize::k64x64;
  const int64_t splits = std::min(kTargetBlocks / unsplit(size).threadblocks, kMaxSplits);
  return allow_split_k ? make_gemm_partition(problem, size, std::min(splits, max_splits(problem)))
                       : unsplit(size);
}

// The GPU that weight gradients are partitioned for, an H200: multiprocessors, bandwidths in bytes and
// throughputs in FLOP per second that kernels of this kind reach. All GPUs use the same partition.
struct ReferenceGpu {
  static constexpr int64_t kMultiprocessors = 132;
  static constexpr double kMemoryBandwidth = 4.3e12, kL2Bandwidth = 6e12;

  static constexpr double flops(MathMode math_mode) {
    return math_mode == MathMode::kFloat32 ? 40e12 : math_mode == MathMode::kTf32 ? 220e12 : 440e12;
  }
};

// Number of threadblocks of the wgrad kernel that run on the reference GPU at once; registers limit it.
// test_cuda_build.py compares it with the compiler's report.
inline int64_t resident_wgrad_blocks(const GemmProblem& problem, TileSize size) {
  const int64_t per_multiprocessor = size == TileSize::k128x128                                         ? 2
                                     : size == TileSize::k64x64 && element_size(problem.math_mode) == 2 ? 4
                                                                                                        : 3;
  return ReferenceGpu::kMultiprocessors * per_multiprocessor;
}

// Return the modeled time of a weight gradient in seconds: the waves of threadblocks, each as long as the
// main loop of one split at the rate of the slowest resource, and the split-K workspace, written and read
// once.
inline double modeled_wgrad_time(const GemmProblem& problem, const GemmPartition& partition) {
  constexpr int64_t kOverheadSteps = 4;  // fill of the pipeline, and epilogue
  const int64_t resident = resident_wgrad_blocks(problem, partition.size);
  const int64_t rows = tile_rows(partition.size), cols = tile_cols(partition.size);
  // Of one main loop iteration: A is formed from two tensors, dy and z.
  const double tile_bytes =
      static_cast<double>((2 * std::min(rows, problem.m) + std::min(cols, problem.n)) * kTileKBytes);
  const double memory_bytes = static_cast<double>((2 * problem.m + problem.n) * kTileKBytes) /
                              static_cast<double>(partition.row_tiles * partition.col_tiles);
  const double flops = static_cast<double>(2 * rows * cols * kTileKBytes / element_size(problem.math_mode));
  const double step_time =
      std::max({tile_bytes / ReferenceGpu::kL2Bandwidth, memory_bytes / ReferenceGpu::kMemoryBandwidth,
                flops / ReferenceGpu::flops(problem.math_mode)});
  const int64_t waves = ceil_div(partition.threadblocks, resident);
  const double workspace_bytes =
      partition.splits > 1 ? static_cast<double>(2 * partition.splits * problem.m * problem.n * 4) : 0;
  return static_cast<double>(waves * resident * (partition.steps_per_split + kOverheadSteps)) * step_time +
         workspace_bytes / ReferenceGpu::kMemoryBandwidth;
}

// Partition a GEMM whose output is a weight gradient. M x N is small and K, all pixels, is long: the tile and
// the number of splits of K with the least modeled time, among those that fill whole waves of threadblocks
// and those that halve one.
//
// A pipeline stage of 128 bytes along K instead of 64 does not pay: it halves the barriers, of which one
// costs about 30 of 2000 clocks between two iterations of a threadblock of 64x64, but doubles the shared
// memory, from 37 to 74 KB (resident threadblocks: 4 to 3) and of 128x128 from 74 to 147 KB (2 to 1; more
// than sm_86, sm_89 and sm_120 have). Two stages of 64 bytes in flight are 98 KB per multiprocessor, above
// the 20 KB that hide the latency of memory.
inline GemmPartition partition_wgrad_gemm(const GemmProblem& problem) {
  constexpr int64_t kMaxSplits = 512, kMaxWaves = 4;
  const int64_t split_limit = std::min(kMaxSplits, max_splits(problem));
  GemmPartition best = make_gemm_partition(problem, TileSize::k64x64, 1);
  double best_time = modeled_wgrad_time(problem, best);
  const auto consider = [&](TileSize size, int64_t splits) {
    const GemmPartition partition =
        make_gemm_partition(problem, size, std::clamp<int64_t>(splits, 1, split_limit));
    const double time = modeled_wgrad_time(problem, partition);
    if (time < best_time) best = partition, best_time = time;
  };
  for (const TileSize size : {TileSize::k128x128, TileSize::k128x64, TileSize::k64x64}) {
    if (!problem.is_instantiated(size) || is_half_empty(problem, size)) continue;
    const int64_t tiles = make_gemm_partition(problem, size, 1).threadblocks;
    const int64_t resident = resident_wgrad_blocks(problem, size);
    for (int64_t waves = 1; waves <= kMaxWaves; ++waves) consider(size, waves * resident / tiles);
    for (int64_t splits = resident / tiles / 2; splits > 0; splits /= 2) consider(size, splits);
  }
  return best;
}

}  // namespace fused_res::cuda
