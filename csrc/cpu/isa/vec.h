// Vec<float> and Vec<double>: as many lanes as the instruction set at hand computes with, at least eight, so
// that a mask of one bit a lane is whole bytes. Everything lives in an anonymous namespace: no symbol of one
// instruction set may be linked into another's code.
//
// Each vec_*.h defines, for V = Vec<S>:
//   V::lanes, V::Mask, V::zero(), V::all(s), V::first(n) -> Mask of the first n lanes, V::from_bits(bits) ->
//   Mask
//   + - *, fma(a, b, c)
//   not_less_equal_zero(a)    !(a <= 0), true for NaN
//   greater_or_nan(a, b)      a > b, or a is NaN: how PyTorch's pooling compares
//   keep(mask, a)             a, or +0 where the mask is unset
//   select(mask, a, b)
//   to_bits(mask)
//   accumulate(sums, a)       sums[i] += a[i], in double
//   load, store (p, ...[, n]) a vector of T = float, double, bfloat16 or float16, or its first n elements
//   (the rest is 0);
//                             rounding is to nearest even
//   stream(p, a)              store past the caches, p aligned to the store; stream_fence() after the last
//   round_to(a, T{})          what store and load would give back
//   store_bytes(p, a)         small whole numbers as bytes
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

// One bit a lane.
using Bits = uint32_t;

// As assembly, because GCC 12 drops __builtin_prefetch from lambdas that do nothing else with memory than to
// read it.
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

// What a tensor of T is computed in.
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

// A load or store of whole vectors, and one of the last few elements: the loops are written once and take
// either.
struct Whole {
  template <class T>
  auto load(const T* p) const {
    return cpu::load(p);
  }
  template <class T, class V>
  void store(T* p, V a) const {
    cpu::store(p, a);
  }
  template <class V>
  V only(V a) const {
    return a;
  }
};

struct Partial {
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
  V only(V a) const {
    return keep(V::first(n), a);
  }
};

// `stream` only where every row of memory is a number of whole, aligned vectors.
template <class T, class V>
inline void put(Whole part, T* p, V a, bool stream) {
  if (stream) {
    cpu::stream(p, a);
  } else {
    part.store(p, a);
  }
}
template <class T, class V>
inline void put(Partial part, T* p, V a, bool) {
  part.store(p, a);
}

template <class S>
inline S first_lane(Vec<S> a) {
  S lanes[Vec<S>::lanes];
  store(lanes, a);
  return lanes[0];
}
template <class S>
inline S total(Vec<S> a) {
  S lanes[Vec<S>::lanes];
  store(lanes, a);
  for (int n = Vec<S>::lanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

inline float element(const float* p) { return *p; }
inline double element(const double* p) { return *p; }
template <class H>
inline float element(const H* p) {
  return first_lane(load(p, 1));
}

template <class V>
inline Bits load_bits(const uint8_t* p, Whole) {
  if constexpr (V::lanes == 8) return *p;
  uint16_t bits;
  memcpy(&bits, p, 2);
  return bits;
}
template <class V>
inline Bits load_bits(const uint8_t* p, Partial part) {
  return part.n <= 8 ? p[0] : p[0] | p[1] << 8;
}
template <class V>
inline void store_bits(uint8_t* p, Bits bits, Whole) {
  if constexpr (V::lanes == 8) {
    *p = static_cast<uint8_t>(bits);
  } else {
    const auto both = static_cast<uint16_t>(bits);
    memcpy(p, &both, 2);
  }
}
template <class V>
inline void store_bits(uint8_t* p, Bits bits, Partial part) {
  bits &= (1u << part.n) - 1;  // the padding is zero
  p[0] = static_cast<uint8_t>(bits);
  if (part.n > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}

}  // namespace
}  // namespace fused_res::cpu
