// Element-level device functions that all kernels share: dtype conversion, vectorized loads and stores, batch
// normalization, ReLU and its gradient mask, and the batch norm input gradient.
#pragma once

#include <math.h>

#include "common/normalize.h"
#include "cuda/device.cuh"
#include "cuda/kernel_args.h"
#include "cuda/ptx.cuh"

namespace fused_res::cuda {

// The dtype of the computation: float64 for float64, float32 for all others.
template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::Type;

__device__ inline float to_float(float x) { return x; }
__device__ inline double to_float(double x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Convert from the accumulator dtype, rounding to nearest even.
template <class T>
__device__ inline T from_float(Accumulator<T> x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// n elements that are loaded and stored in one access, at an address that is a multiple of their total size.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  T values[n];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

// Number of elements of a 16-byte access.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <int n, class T>
__device__ inline Vector<T, n> load(const T* at) {
  return *reinterpret_cast<const Vector<T, n>*>(at);
}

// Load n elements, or return zeros and read nothing if not `valid`.
template <int n, class T>
__device__ inline Vector<T, n> load(const T* at, bool valid) {
  Vector<T, n> vector;
  if (valid) {
    vector = load<n>(at);
  } else {
    for (int i = 0; i < n; ++i) vector[i] = from_float<T>(0);
  }
  return vector;
}

template <class T, int n>
__device__ inline void store(T* at, const Vector<T, n>& vector) {
  *reinterpret_cast<Vector<T, n>*>(at) = vector;
}

// Store n elements to global memory, 16 bytes in a single access.
template <class T, int n>
__device__ inline void store_global(T* at, const Vector<T, n>& vector) {
  if constexpr (sizeof(vector) == 16) {
    ptx::store_16_bytes(at, &vector);
  } else {
    store(at, vector);
  }
}

// Load a channel's parameter, or return `default_value` if the parameter is absent.
template <class A>
__device__ inline A load_parameter(Parameter parameter, int64_t channel, A default_value) {
  if (parameter.data == nullptr) return default_value;
  switch (parameter.dtype) {
    case Dtype::kFloat32:
      return static_cast<A>(static_cast<const float*>(parameter.data)[channel]);
    case Dtype::kFloat64:
      return static_cast<A>(static_cast<const double*>(parameter.data)[channel]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(parameter.data)[channel]);
    case Dtype::kFloat16:
      return to_float(static_cast<const __half*>(parameter.data)[channel]);
  }
  return default_value;
}

// Store a channel's parameter. float64 is rounded to the 16-bit dtypes by way of float32, as in PyTorch.
template <class A>
__device__ inline void store_parameter(void* data, Dtype dtype, int64_t channel, A value) {
  switch (dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(data)[channel] = static_cast<float>(value);
      return;
    case Dtype::kFloat64:
      static_cast<double*>(data)[channel] = value;
      return;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[channel] = from_float<__nv_bfloat16>(static_cast<float>(value));
      return;
    case Dtype::kFloat16:
      static_cast<__half*>(data)[channel] = from_float<__half>(static_cast<float>(value));
      return;
  }
}

// Batch normalization of one element. The forward, the operand prologues and every backward use this
// function, so that they agree bitwise on the sign of the result and hence on the ReLU mask.
template <class A>
__device__ inline A batch_normalize(A x, A mean, A scale, A shift) {
  return normalize(x - mean, scale, shift);
}

// ReLU that propagates NaN, as in PyTorch.
template <class A>
__device__ inline A relu(A y) {
  return y <= 0 ? A(0) : y;
}

// Whether the gradient of the ReLU at y is one. It is one at NaN, as in PyTorch.
template <class A>
__device__ inline bool relu_grad_mask(A y) {
  return !(y <= 0);
}

// Return the gradient with respect to a norm's input z, from the masked gradient dy with respect to its
// output. `a` and `b` are the BackwardMeans of the channel.
template <class A>
__device__ inline A norm_input_grad(A dy, A z, A mean, A scale, A a, A b) {
  return scale * (dy - fma(z - mean, b, a));
}

// Per-channel terms of the batch norm backward: a = mean(dy), b = mean(dy * xhat) * invstd.
template <class A>
struct BackwardMeans {
  A a, b;
};

// Compute the backward means from the sums of dy and of dy * xhat over `count` values.
template <class A>
__device__ inline BackwardMeans<A> backward_means(A sum_dy, A sum_dy_xhat, A count, A invstd) {
  return {sum_dy / count, sum_dy_xhat / count * invstd};
}

// Pack the mask bits of adjacent lanes into bytes, least significant bit first. Consecutive threads of a warp
// hold n bits each, for consecutive elements; every thread whose elements begin a byte receives that byte.
// All threads of the warp must call this function.
template <int n>
__device__ inline unsigned pack_mask_byte(unsigned bits) {
  if constexpr (n == 1) {
    return __ballot_sync(~0u, bits != 0) >> (threadIdx.x % kWarpSize) & 0xff;
  } else {
    for (int width = n; width < 8; width *= 2) bits |= __shfl_down_sync(~0u, bits, width / n) << width;
    return bits;
  }
}

}  // namespace fused_res::cuda
