// What cases of convolutions and of their backward have in common.
#pragma once

#include "cases.h"
#include "cuda/product.h"

namespace fused_res::cuda::sanitize {

constexpr Arithmetic kArithmetics[] = {Arithmetic::kBFloat16, Arithmetic::kFloat16, Arithmetic::kTf32,
                                       Arithmetic::kExact};
constexpr TileSize kTileSizes[] = {TileSize::kLarge, TileSize::kTall, TileSize::kSmall};

inline Dtype dtype_of(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kBFloat16  ? Dtype::kBFloat16
         : arithmetic == Arithmetic::kFloat16 ? Dtype::kFloat16
                                              : Dtype::kFloat32;
}

inline std::string name_of(Arithmetic arithmetic, TileSize size, bool aligned) {
  constexpr const char* kNames[] = {"bfloat16", "float16", "tf32", "exact"};
  constexpr const char* kSizes[] = {" large", " tall", " small"};
  return std::string(kNames[static_cast<int>(arithmetic)]) + kSizes[static_cast<int>(size)] +
         (aligned ? "" : " unaligned");
}

inline ProductShape product_of(int64_t rows, int64_t cols, int64_t depth, int64_t groups,
                               Arithmetic arithmetic, bool aligned, bool formed) {
  return {.rows = rows,
          .cols = cols,
          .depth = depth,
          .groups = groups,
          .arithmetic = arithmetic,
          .aligned = aligned,
          .formed = formed};
}

// For those that there are kernels for: f(size, aligned).
template <class F>
void for_each_tile(Arithmetic arithmetic, bool formed, F f) {
  for (const TileSize size : kTileSizes) {
    for (const bool aligned : {true, false}) {
      if (size < product_of(0, 0, 0, 1, arithmetic, aligned, formed).largest()) continue;
      f(size, aligned);
    }
  }
}

}  // namespace fused_res::cuda::sanitize
