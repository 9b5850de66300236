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

// Threadblocks that fill a large GPU. With fewer, a smaller tile is chosen and K is split.
constexpr int64_t kTargetBlocks = 256;

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

// Return the first usable tile of 128x128 (if N > 64), 128x64 (if M > 64) and 64x64. The larger two are
// usable if they are instantiated and give at least kTargetBlocks threadblocks with `splits` splits of K.
inline TileSize choose_tile(const GemmProblem& problem, int64_t splits) {
  const auto is_usable = [&](TileSize size) {
    return problem.is_instantiated(size) &&
           make_gemm_partition(problem, size, 1).threadblocks * splits >= kTargetBlocks;
  };
  if (problem.n > 64 && is_usable(TileSize::k128x128)) return TileSize::k128x128;
  return problem.m > 64 && is_usable(TileSize::k128x64) ? TileSize::k128x64 : TileSize::k64x64;
}

// Partition a GEMM whose output is an activation (forward, dgrad). Smaller tiles are preferred to split-K,
// since the split-K workspace of an activation is large.
inline GemmPartition partition_activation_gemm(const GemmProblem& problem, bool allow_split_k) {
  constexpr int64_t kMaxSplits = 16;
  const TileSize size = choose_tile(problem, 1);
  const GemmPartition unsplit = make_gemm_partition(problem, size, 1);
  const int64_t splits = std::min(kTargetBlocks / unsplit.threadblocks, kMaxSplits);
  return allow_split_k ? make_gemm_partition(problem, size, std::min(splits, max_splits(problem))) : unsplit;
}

// Partition a GEMM whose output is a weight gradient. M x N is small and K, all pixels, is long: K is split
// until there are kTargetBlocks threadblocks.
inline GemmPartition partition_wgrad_gemm(const GemmProblem& problem) {
  const TileSize size = choose_tile(problem, max_splits(problem));
  const int64_t splits = kTargetBlocks / make_gemm_partition(problem, size, 1).threadblocks;
  return make_gemm_partition(problem, size, std::min(splits, max_splits(problem)));
}

}  // namespace fused_res::cuda
