// Dispatch of runtime GEMM parameters to the template arguments of a kernel.
#pragma once

#include "cuda/gemm_mainloop.cuh"
#include "cuda/gemm_partition.h"

namespace fused_res::cuda {

// Call f.template operator()<T, simt>(). `simt` selects CUDA cores instead of tensor cores.
template <class F>
void dispatch_math_mode(MathMode math_mode, const F& f) {
  switch (math_mode) {
    case MathMode::kBFloat16:
      return f.template operator()<__nv_bfloat16, false>();
    case MathMode::kFloat16:
      return f.template operator()<__half, false>();
    case MathMode::kTf32:
      return f.template operator()<float, false>();
    case MathMode::kFloat32:
      return f.template operator()<float, true>();
  }
}

// Call f.template operator()<T, simt, Shape, aligned>(). Only tiles for which
// GemmProblem::is_instantiated() holds are instantiated.
template <bool grad_prologue, class F>
void dispatch_tile(MathMode math_mode, TileSize size, bool aligned, const F& f) {
  dispatch_math_mode(math_mode, [&]<class T, bool simt>() {
    constexpr bool allow_128x64 = !grad_prologue || sizeof(T) == 2, allow_128x128 = allow_128x64 && !simt;
    if constexpr (allow_128x128) {
      if (size == TileSize::k128x128) return f.template operator()<T, simt, Tile128x128, true>();
    }
    if constexpr (allow_128x64) {
      if (size == TileSize::k128x64) return f.template operator()<T, simt, Tile128x64, true>();
    }
    if (aligned) {
      f.template operator()<T, simt, Tile64x64, true>();
    } else {
      f.template operator()<T, simt, Tile64x64, false>();
    }
  });
}

}  // namespace fused_res::cuda
