// How a matrix product is cut: tiles, and parts of the sum where tiles are few. By shape and dtype alone: the
// same input gives the same bits on every GPU.
#pragma once

#include <algorithm>

#include "cuda/operands.h"

namespace fused_res::cuda {

// What products are computed in; all sums are float32. Exact: float32 without tensor cores.
enum class Arithmetic { kBFloat16, kFloat16, kTf32, kExact };

enum class TileSize { kLarge, kTall, kSmall };  // 128 x 128, 128 x 64, 64 x 64

struct ProductCut {
  TileSize size;
  int64_t row_tiles, col_tiles;
  int64_t splits, steps_per_split;  // of the sum
  int64_t blocks;
};

constexpr int64_t rows_of(TileSize size) { return size == TileSize::kSmall ? 64 : 128; }
constexpr int64_t cols_of(TileSize size) { return size == TileSize::kLarge ? 128 : 64; }
constexpr int64_t element_size(Arithmetic arithmetic) { return arithmetic < Arithmetic::kTf32 ? 2 : 4; }

struct ProductShape {
  int64_t rows, cols, depth;  // depth: terms of a sum
  int64_t groups;             // products like this one in a launch
  Arithmetic arithmetic;
  bool aligned;  // 16 bytes of the operands may be read at once
  bool formed;   // an operand is computed from others

  // For operands that are not aligned there are no larger tiles, and those of others have to fit the
  // registers.
  TileSize largest() const {
    if (!aligned || (formed && element_size(arithmetic) == 4)) return TileSize::kSmall;
    return arithmetic == Arithmetic::kExact ? TileSize::kTall : TileSize::kLarge;
  }
};

// Blocks that keep a large GPU busy; with fewer, tiles get smaller and sums are split.
constexpr int64_t kEnoughBlocks = 256;

// Parts of the sum that are worth their pass over memory, each so many steps.
inline int64_t most_splits(const ProductShape& product) {
  constexpr int64_t kLeastSteps = 8;
  return std::max<int64_t>(1, ceil_div(product.depth * element_size(product.arithmetic), 64) / kLeastSteps);
}

inline ProductCut cut_into(const ProductShape& product, TileSize size, int64_t most_splits) {
  const int64_t row_tiles = ceil_div(product.rows, rows_of(size));
  const int64_t col_tiles = ceil_div(product.cols, cols_of(size));
  const int64_t steps = ceil_div(product.depth * element_size(product.arithmetic), 64);
  const int64_t steps_per_split = ceil_div(steps, std::max<int64_t>(1, most_splits));
  const int64_t splits = ceil_div(steps, steps_per_split);
  return {size,   row_tiles,       col_tiles,
          splits, steps_per_split, row_tiles * col_tiles * product.groups * splits};
}

// The largest tile that is no wider than need be and of which, each `splits` times, there are enough.
inline TileSize choose_tile(const ProductShape& product, int64_t splits) {
  const auto suits = [&](TileSize size) {
    return product.largest() <= size && cut_into(product, size, 1).blocks * splits >= kEnoughBlocks;
  };
  if (product.cols > 64 && suits(TileSize::kLarge)) return TileSize::kLarge;
  return product.rows > 64 && suits(TileSize::kTall) ? TileSize::kTall : TileSize::kSmall;
}

// An activation: its tiles get smaller first, as splits of its sums are large.
inline ProductCut cut_activation(const ProductShape& product, bool may_split) {
  constexpr int64_t kMostSplits = 16;
  const TileSize size = choose_tile(product, 1);
  const ProductCut whole = cut_into(product, size, 1);
  const int64_t wanted = std::min(kEnoughBlocks / whole.blocks, kMostSplits);
  return may_split ? cut_into(product, size, std::min(wanted, most_splits(product))) : whole;
}

// The gradient of a weight, which is small: its sums, over all pixels, are split as far as need be.
inline ProductCut cut_weight(const ProductShape& product) {
  const TileSize size = choose_tile(product, most_splits(product));
  const int64_t wanted = kEnoughBlocks / cut_into(product, size, 1).blocks;
  return cut_into(product, size, std::min(wanted, most_splits(product)));
}

}  // namespace fused_res::cuda
