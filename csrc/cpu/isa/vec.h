// SIMD abstraction: Vec<float> and Vec<double> have as many lanes as a register of the instruction set, but
// at least eight, so that a mask of one bit per lane fills whole bytes. Everything is in an anonymous
// namespace: no symbol of one instruction set may be linked into another's code.
//
// Each vec_*.h defines, for V = Vec<S>:
//   V::lanes, V::Mask, V::zero(), V::broadcast(s), V::first(n) -> Mask of the first n lanes,
//   V::from_bits(bits) -> Mask
//   + - * /, fma(a, b, c)
//   clamp(a, low, high)       a for NaN
//   scale_by_power_of_two(a, n)  a * 2^n, rounded once; n integral, in the range of exponents of exp()
//   greater_zero(a)           a > 0, false for NaN
//   not_less_equal_zero(a)    !(a <= 0), true for NaN
//   greater_or_nan(a, b)      a > b, or a is NaN: how PyTorch's pooling compares
//   maskz(mask, a)            a, or +0 where the mask is unset
//   select(mask, a, b)
//   to_bits(mask)
//   accumulate(sums, a)       sums[i] += a[i], in double
//   load, store (p, ...[, n]) a vector of T = float, double, bfloat16 or float16, or its first n elements
//                             (load sets the others to 0); rounds to nearest even
//   stream(p, a)              streaming store, p aligned to the store; stream_fence() after the last one
//   round_to(a, T{})          a rounded to T: the value after a store and a load
//   store_bytes(p, a)         small integers as bytes
//   bytes_equal<V>(p, value) -> Mask
#pragma once

#include <stdint.h>
#include <string.h>

namespace fused_res::cpu {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// One bit per lane.
using Bits = uint32_t;

// A compile-time integer as a function argument.
template <int N>
struct Int {
  static constexpr int value = N;
};

// Inline assembly, because GCC 12 drops __builtin_prefetch from lambdas that only read memory.
inline void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p);
#endif
}

inline void prefetch_to_write(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

template <class S>
struct Vec;

}  // namespace
}  // namespace fused_res::cpu

#if defined(__AVX512F__)
#include "cpu/isa/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/isa/vec_avx2.h"
#else
#include "cpu/isa/vec_baseline.h"
#endif

namespace fused_res::cpu {
namespace {

// The scalar type in which a tensor of T is computed: float, or double for double.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

inline Vec<float> round_to(Vec<float> a, float) { return a; }
inline Vec<double> round_to(Vec<double> a, double) { return a; }

// Full-vector and masked memory access. Loops are written once, with a parameter `part` that is FullVector{}
// or, for the tail of a row, TailVector{n}.
struct FullVector {
  template <class T>
  auto load(const T* p) const {
    return cpu::load(p);
  }
  template <class T, class V>
  void store(T* p, V a) const {
    cpu::store(p, a);
  }
  template <class V>
  V zero_tail(V a) const {
    return a;
  }
};

struct TailVector {
  int n;  // 0 < n < lanes
  template <class T>
  auto load(const T* p) const {
    return cpu::load(p, n);
  }
  template <class T, class V>
  void store(T* p, V a) const {
    cpu::store(p, a, n);
  }
  template <class V>
  V zero_tail(V a) const {
    return maskz(V::first(n), a);
  }
};

// `stream` may only be set where every row of memory is a number of aligned full vectors.
template <class T, class V>
inline void store_or_stream(FullVector part, T* p, V a, bool stream) {
  if (stream) {
    cpu::stream(p, a);
  } else {
    part.store(p, a);
  }
}
template <class T, class V>
inline void store_or_stream(TailVector part, T* p, V a, bool) {
  part.store(p, a);
}

template <class S>
inline S first_lane(Vec<S> a) {
  S lanes[Vec<S>::lanes];
  store(lanes, a);
  return lanes[0];
}
template <class S>
inline S reduce_add(Vec<S> a) {
  S lanes[Vec<S>::lanes];
  store(lanes, a);
  for (int n = Vec<S>::lanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

inline float load_scalar(const float* p) { return *p; }
inline double load_scalar(const double* p) { return *p; }
template <class H>
inline float load_scalar(const H* p) {
  return first_lane(load(p, 1));
}

template <class V>
inline Bits load_bits(const uint8_t* p, FullVector) {
  if constexpr (V::lanes == 8) return *p;
  uint16_t bits;
  memcpy(&bits, p, 2);
  return bits;
}
template <class V>
inline Bits load_bits(const uint8_t* p, TailVector part) {
  return part.n <= 8 ? p[0] : p[0] | p[1] << 8;
}
template <class V>
inline void store_bits(uint8_t* p, Bits bits, FullVector) {
  if constexpr (V::lanes == 8) {
    *p = static_cast<uint8_t>(bits);
  } else {
    const auto both = static_cast<uint16_t>(bits);
    memcpy(p, &both, 2);
  }
}
template <class V>
inline void store_bits(uint8_t* p, Bits bits, TailVector part) {
  bits &= (1u << part.n) - 1;  // the padding is zero
  p[0] = static_cast<uint8_t>(bits);
  if (part.n > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}

}  // namespace
}  // namespace fused_res::cpu
