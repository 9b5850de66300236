// Types shared by the host and the device side of every operator, free of torch and CUDA headers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

struct CUstream_st;

namespace fused_res::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// A per-channel parameter vector of any floating-point dtype; `data` is null if it is absent.
struct Parameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fused_res::cuda
