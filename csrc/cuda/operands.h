// What host and device sides say to each other, without torch or CUDA's headers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

struct CUstream_st;

namespace fused_res::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// One number a channel, of a dtype of its own; null where there is none.
struct Parameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fused_res::cuda
