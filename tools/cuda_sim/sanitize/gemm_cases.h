// Shared definitions of the sanitizer cases of implicit-GEMM kernels: math modes, tile sizes, names.
#pragma once

#include "cases.h"
#include "cuda/gemm_partition.h"

namespace fused_res::cuda::sanitize {

constexpr MathMode kMathModes[] = {MathMode::kBFloat16, MathMode::kFloat16, MathMode::kTf32,
                                   MathMode::kFloat32};
constexpr TileSize kTileSizes[] = {TileSize::k128x128, TileSize::k128x64, TileSize::k64x64};

inline Dtype dtype_of(MathMode math_mode) {
  return math_mode == MathMode::kBFloat16  ? Dtype::kBFloat16
         : math_mode == MathMode::kFloat16 ? Dtype::kFloat16
                                           : Dtype::kFloat32;
}

inline std::string name_of(MathMode math_mode, TileSize size, bool aligned) {
  constexpr const char* kNames[] = {"bfloat16", "float16", "tf32", "float32"};
  constexpr const char* kSizes[] = {" 128x128", " 128x64", " 64x64"};
  return std::string(kNames[static_cast<int>(math_mode)]) + kSizes[static_cast<int>(size)] +
         (aligned ? "" : " unaligned");
}

inline GemmProblem gemm_problem(int64_t m, int64_t n, int64_t k, int64_t groups, MathMode math_mode,
                                bool aligned, bool grad_prologue) {
  return {.m = m,
          .n = n,
          .k = k,
          .groups = groups,
          .math_mode = math_mode,
          .aligned = aligned,
          .grad_prologue = grad_prologue};
}

// Calls f(size, aligned) for each tile size and alignment for which there is a kernel.
template <class F>
void for_each_tile(MathMode math_mode, bool grad_prologue, F f) {
  for (const TileSize size : kTileSizes) {
    for (const bool aligned : {true, false}) {
      if (gemm_problem(0, 0, 0, 1, math_mode, aligned, grad_prologue).is_instantiated(size)) f(size, aligned);
    }
  }
}

}  // namespace fused_res::cuda::sanitize
