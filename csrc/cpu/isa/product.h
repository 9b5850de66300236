// The one matrix product behind every convolution: a few rows of A times a panel of 32 columns of B, summed
// in registers. Its rows are as many as the registers hold; each sum runs over the whole depth in order, so
// an output has the same bits in whichever block it is computed.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vec.h"

namespace fused_res::cpu {
namespace {

// Two vectors of columns at a time: the panel, or with narrower vectors half of it.
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * Vec<float>::lanes;
static_assert(kPanelOutputs % kColumns == 0);

// Registers: kRows * kVectors sums, kVectors columns and a broadcast element of A.
#if defined(__AVX512F__)
constexpr int kRows = 14;  // of 32
#else
constexpr int kRows = 6;  // of 16
#endif

// How far ahead of the products B is asked for, in floats. The processor's own prefetcher stops at every
// page; a weight of megabytes, read once for a few rows (one image, 256 channels of 14x14), comes from
// memory 1.3x as fast with this.
constexpr int64_t kPrefetch = 64 * kPanelOutputs, kLine = 16;

template <int N>
struct Int {
  static constexpr int value = N;
};

// f(Int<rows>), for 1 to kRows rows.
template <int R = kRows, class F>
inline void with_rows(int64_t rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f(Int<R>{});
}

// sums[r] = a[r][0..depth) * b[0..depth)[0..kColumns), in registers where the caller's loops are unrolled,
// too. Rows of A are `stride` apart, those of B kPanelOutputs.
template <int R>
[[gnu::always_inline]] inline void sum_products(const float* a, int64_t stride, const float* b, int64_t depth,
                                                Vec<float> (&sums)[R][kVectors]) {
  using V = Vec<float>;
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = V::zero();
  }
  // Three rows to a pointer: an instruction adds once or twice the stride by itself, and 14 pointers would
  // not fit into the registers.
  constexpr int kPointers = (R + 2) / 3;
  const float* pointers[kPointers];
  for (int i = 0; i < kPointers; ++i) pointers[i] = a + 3 * i * stride;
  for (int64_t k = 0; k < depth; ++k) {
    V columns[kVectors];
    prefetch(b + kPrefetch);
    prefetch(b + kPrefetch + kLine);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * V::lanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const V element = V::all(pointers[r / 3][r % 3 * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(element, columns[v], sums[r][v]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < kPointers; ++i) ++pointers[i];
    b += kPanelOutputs;
  }
}

// The same for 1 to kRows rows, to memory, where rows are kPanelOutputs apart.
template <int R>
inline void multiply(const float* a, int64_t stride, const float* b, int64_t depth, float* to) {
  using V = Vec<float>;
  V sums[R][kVectors];
  sum_products<R>(a, stride, b, depth, sums);
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(to + r * kPanelOutputs + v * V::lanes, sums[r][v]);
  }
}
inline void multiply_rows(int64_t rows, const float* a, int64_t stride, const float* b, int64_t depth,
                          float* to) {
  with_rows(rows, [&](auto count) { multiply<count.value>(a, stride, b, depth, to); });
}

// sums[r][0..kColumns) (+)= a[0..depth)[r] * b[0..depth)[0..kColumns): A is read down its columns, and so its
// elements lie together. Summed apart from what is there already, which keeps the rounding small.
template <int R>
inline void multiply_down(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                          bool first, float* to) {
  using V = Vec<float>;
  V sums[R][kVectors];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = V::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    V columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * V::lanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const V element = V::all(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(element, columns[v], sums[r][v]);
    }
    a += a_stride;
    b += b_stride;
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* sum = to + r * kPanelOutputs + v * V::lanes;
      store(sum, first ? sums[r][v] : load(sum) + sums[r][v]);
    }
  }
}

inline void multiply_rows_down(int64_t rows, const float* a, int64_t a_stride, const float* b,
                               int64_t b_stride, int64_t depth, bool first, float* to) {
  with_rows(rows,
            [&](auto count) { multiply_down<count.value>(a, a_stride, b, b_stride, depth, first, to); });
}

// f(first row, rows) for blocks of registers, as equal as can be: one of two rows would wait for its own
// sums.
template <class F>
inline void for_each_row_block(int64_t rows, F f) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = rows * block / blocks;
    f(begin, rows * (block + 1) / blocks - begin);
  }
}

}  // namespace
}  // namespace fused_res::cpu
