// What all kernels do with single elements: their types, 16-byte accesses, the one normalise, ReLU and its
// mask, the gradient before a norm.
#pragma once

#include <math.h>

#include "common/normalize.h"
#include "cuda/device.cuh"
#include "cuda/operands.h"
#include "cuda/ptx.cuh"

namespace fused_res::cuda {

// What is computed in: double for double, float for all else.
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

// Rounds to nearest even.
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

// n elements that are read and written at once, from an address that is a multiple of their size.
template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  T values[n];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

// Elements of a 16-byte access.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <int n, class T>
__device__ inline Vector<T, n> load(const T* at) {
  return *reinterpret_cast<const Vector<T, n>*>(at);
}

// Zeros where not `valid`; nothing is read then.
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

// The same, to global memory, in as few accesses as there can be.
template <class T, int n>
__device__ inline void store_global(T* at, const Vector<T, n>& vector) {
  if constexpr (sizeof(vector) == 16) {
    ptx::store_16_bytes(at, &vector);
  } else {
    store(at, vector);
  }
}

// A channel's parameter, or `otherwise` where there are none.
template <class A>
__device__ inline A load_parameter(Parameter parameter, int64_t channel, A otherwise) {
  if (parameter.data == nullptr) return otherwise;
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
  return otherwise;
}

// Forward, prologue and every backward decide the sign by these bits.
template <class A>
__device__ inline A normalise(A x, A mean, A scale, A shift) {
  return normalize(x - mean, scale, shift);
}

// NaN stays NaN, as in PyTorch.
template <class A>
__device__ inline A relu(A y) {
  return y <= 0 ? A(0) : y;
}

// Where a ReLU lets the gradient through: at NaN, too.
template <class A>
__device__ inline bool passes(A y) {
  return !(y <= 0);
}

// The gradient of a norm's input z from the masked one behind it; `a` and `b` are what batch statistics take
// from it, see mean_terms.
template <class A>
__device__ inline A before_norm(A dy, A z, A mean, A scale, A a, A b) {
  return scale * (dy - fma(z - mean, b, a));
}

template <class A>
struct MeanTerms {
  A a, b;
};

// From the sums over `count` values of dy and of dy * xhat.
template <class A>
__device__ inline MeanTerms<A> mean_terms(A sum_dy, A sum_dy_xhat, A count, A invstd) {
  return {sum_dy / count, sum_dy_xhat / count * invstd};
}

// Bits in memory are least significant first. Threads of a warp that follow each other hold n bits each, of
// elements that follow each other; every thread whose elements begin a byte receives it. All of a warp must
// come here.
template <int n>
__device__ inline unsigned whole_byte(unsigned bits) {
  if constexpr (n == 1) {
    return __ballot_sync(~0u, bits != 0) >> (threadIdx.x % kWarp) & 0xff;
  } else {
    for (int width = n; width < 8; width *= 2) bits |= __shfl_down_sync(~0u, bits, width / n) << width;
    return bits;
  }
}

}  // namespace fused_res::cuda
