// CUDA's built-in variables and functions for g++, as far as the kernels of csrc/cuda use them. Barriers and
// warp collectives take their call site, for messages, and to distinguish one barrier from another.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime.h"

// For kernels that are not declared with FUSED_RES_KERNEL.
#undef __launch_bounds__
#define __launch_bounds__(...)

// Set whenever a thread is resumed.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- barriers and votes ---

inline void __syncthreads(fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  fused_res::cuda::sim::block_barrier(fused_res::cuda::sim::Vote::kNone, false, "__syncthreads", site);
}
inline int __syncthreads_or(int value,
                            fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  return fused_res::cuda::sim::block_barrier(fused_res::cuda::sim::Vote::kOr, value != 0, "__syncthreads_or",
                                             site);
}
inline int __syncthreads_and(int value,
                             fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  return fused_res::cuda::sim::block_barrier(fused_res::cuda::sim::Vote::kAnd, value != 0,
                                             "__syncthreads_and", site);
}
inline int __syncthreads_count(int value,
                               fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  return fused_res::cuda::sim::block_barrier(fused_res::cuda::sim::Vote::kCount, value != 0,
                                             "__syncthreads_count", site);
}
inline void __syncwarp(unsigned mask = ~0u,
                       fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  fused_res::cuda::sim::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int value,
                              fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  return fused_res::cuda::sim::ballot(mask, value != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int value,
                      fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  return fused_res::cuda::sim::ballot(mask, value != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int value,
                      fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  return fused_res::cuda::sim::ballot(mask, value != 0, "__all_sync", site) == mask;
}

// --- shuffles ---

namespace fused_res::cuda::sim {

template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, const char* what, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source_lane, what, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Shuffles are within segments of `width` lanes; a lane that would read outside of its segment returns its
// own value.
inline unsigned lane() { return threadIdx.x % 32; }
inline unsigned segment(int width) { return lane() / width * width; }

}  // namespace fused_res::cuda::sim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  const unsigned lane = fused_res::cuda::sim::segment(width) + static_cast<unsigned>(source) % width;
  return fused_res::cuda::sim::shuffle(mask, value, lane, "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  const unsigned own = fused_res::cuda::sim::lane(), other = own ^ static_cast<unsigned>(lane_mask);
  const bool inside = other < fused_res::cuda::sim::segment(width) + width;
  return fused_res::cuda::sim::shuffle(mask, value, inside ? other : own, "__shfl_xor_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  const unsigned own = fused_res::cuda::sim::lane();
  const bool inside = own + delta < fused_res::cuda::sim::segment(width) + width;
  return fused_res::cuda::sim::shuffle(mask, value, inside ? own + delta : own, "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 fused_res::cuda::sim::Site site = fused_res::cuda::sim::Site::current()) {
  const unsigned own = fused_res::cuda::sim::lane();
  const bool inside = own >= fused_res::cuda::sim::segment(width) + delta;
  return fused_res::cuda::sim::shuffle(mask, value, inside ? own - delta : own, "__shfl_up_sync", site);
}

// --- memory ---

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
T __ldca(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, std::type_identity_t<T> value) {
  *at = value;
}
template <class T>
void __stcg(T* at, std::type_identity_t<T> value) {
  *at = value;
}

// The fence is part of the atomic operation below: ThreadSanitizer does not support standalone fences.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>,
                "no floating-point atomics: they make results depend on the order of threads");
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}

// --- arithmetic ---

using std::fma;
using std::isfinite;
using std::isinf;
using std::isnan;

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}

// As in CUDA, the result is the other operand if one is NaN; std::min's depends on the order of its operands.
template <class T>
constexpr T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
