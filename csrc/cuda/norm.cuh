// Batch norm (+ ReLU) of n adjacent channels, for GEMM operand prologues and epilogues.
#pragma once

#include "cuda/elementwise.cuh"

namespace fused_res::cuda {

// Mean, scale and shift of n adjacent channels, from `stats` (5, channels).
template <int n>
struct Norm {
  Vector<float, n> mean, scale, shift;

  __device__ Norm(const float* stats, int64_t channels, int64_t channel)
      : mean(load<n>(stats + channel)),
        scale(load<n>(stats + 2 * channels + channel)),
        shift(load<n>(stats + 3 * channels + channel)) {}

  __device__ float operator()(float x, int i) const {
    return batch_normalize(x, mean[i], scale[i], shift[i]);
  }

  template <class T>
  __device__ Vector<T, n> activate(Vector<T, n> x, bool with_relu) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float y = (*this)(to_float(x[i]), i);
      x[i] = from_float<T>(with_relu ? relu(y) : y);
    }
    return x;
  }
};

}  // namespace fused_res::cuda
